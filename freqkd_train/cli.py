"""`freqkd-train`: options in, one call, files out. Heavy imports wait until they are used.

Data goes to stdout, talk to stderr. Exit status: 0 done, 1 a check failed, 2 wrong use or input, 130 interrupted.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from freqkd_analysis.commands import AsJson, application, option

app = application(
    "freqkd-train", "Distil a network's features of visible images into a student of infrared images, band by band."
)
config_app = typer.Typer(no_args_is_help=True, help="Settings: show, compare, list losses and recipes.")
cache_app = typer.Typer(no_args_is_help=True, help="Stored teacher features: list and remove.")
app.add_typer(config_app, name="config")
app.add_typer(cache_app, name="cache")

_WHAT, _LOSS, _LOOP = "What is distilled", "Loss", "Training"


OPTIONS = {
    "data": "data.spec", "size": "data.size", "teacher": "teacher.name", "teacher_weights": "teacher.weights",
    "layers": "teacher.layers", "student": "student.name", "student_weights": "student.weights",
    "adapt": "student.adapt", "merge": "student.merge", "loss": "loss.name", "weights_from": "loss.weights_from",
    "rule": "loss.rule", "normalize": "loss.normalize", "match_gradient": "loss.match_gradient",
    "epochs": "training.epochs", "batch_size": "training.batch", "lr": "training.lr", "device": "training.device",
    "cache_gb": "training.cache_gb", "seed": "seed",
}  # fmt: skip
"""The settings that have an option of their own; all others go through --set."""


@app.command()
def distill(
    context: typer.Context,
    data: Annotated[str, option(panel=_WHAT, help="LAYOUT:ROOT, see `freqkd-analyze data list`.")] = "synthetic",
    teacher: Annotated[str, option(panel=_WHAT, help="timm name, freqkd_demo, or auto.")] = "auto",
    student: Annotated[str, option(panel=_WHAT, help="timm name; empty: the teacher's.")] = "",
    teacher_weights: Annotated[str, option(panel=_WHAT, help="auto | pretrained | random | FILE.")] = "auto",
    student_weights: Annotated[str, option(panel=_WHAT, help="The same, or mix:SHARE:FILE.")] = "auto",
    layers: Annotated[str, option(panel=_WHAT, help="Of the teacher: all | 7,15,19 | glob.")] = "all",
    size: Annotated[str, option(panel=_WHAT, help="Network input, px: N or ROWSxCOLUMNS.")] = "224",
    adapt: Annotated[str, option(panel=_WHAT, help="auto | lora | full | last:K | head.")] = "auto",
    merge: Annotated[float | None, option(panel=_WHAT, help="Share of the change kept on export.")] = None,
    loss: Annotated[str, option(panel=_LOSS, help="See `freqkd-train config losses`.")] = "released",
    weights_from: Annotated[str, option(panel=_LOSS, help="Run of the analysis, for `measured`.")] = "",
    rule: Annotated[str, option(panel=_LOSS, help="shared | precision.")] = "shared",
    normalize: Annotated[str, option(panel=_LOSS, help="none | band (by the teacher's energy).")] = "none",
    match_gradient: Annotated[
        str, option(panel=_LOSS, help="Scale to this FreqKD preset's gradient at step 0, such as released.")
    ] = "",
    epochs: Annotated[int, option(panel=_LOOP, min=0, help="Passes over the training pairs.")] = 12,
    batch_size: Annotated[int, option(panel=_LOOP, min=1, help="Pairs a step.")] = 32,
    lr: Annotated[float, option(panel=_LOOP, help="Highest learning rate.")] = 2e-4,
    cache_gb: Annotated[float, option(panel=_LOOP, min=0, help="Room for stored teacher features.")] = 0.0,
    device: Annotated[str, option(panel=_LOOP, help="auto | cpu | cuda | cuda:N.")] = "auto",
    seed: Annotated[int, option(panel=_LOOP, min=0, help="Seed of split, order, augmentation, initial weights.")] = 0,
    recipe: Annotated[str, option(help="Start from a recipe, see `freqkd-train config recipes`.")] = "",
    preset: Annotated[str, option(help="Scale of the recipe: paper | compact | smoke.")] = "",
    config: Annotated[Path | None, option(help="Start from a YAML file, such as a run's config.yaml.")] = None,
    changes: Annotated[list[str] | None, option("--set", metavar="KEY=VALUE", help="Any; see `config show`.")] = None,
    resume: Annotated[bool, option(help="Finish the interrupted run in --out.")] = False,
    dry_run: Annotated[bool, option(help="Say parameters, memory, disk and time from a few steps.")] = False,
    as_json: Annotated[bool, option("--json", help="One JSON object on stdout.")] = False,
    out: Annotated[Path | None, option(help="Run folder (default: runs/TIME-distill).")] = None,
) -> None:
    """Train a student on infrared images to have the teacher's features of the visible ones.

    Example: freqkd-train distill --data folder:scenes/visible:scenes/infrared --teacher resnet50 --loss released
    """
    from freqkd_analysis import terminal
    from freqkd_train import choose, job

    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    options = {OPTIONS[name]: context.params[name] for name in given if name in OPTIONS}
    settings = choose.settings(options, changes or [], config, recipe, preset, out if resume else None)
    if dry_run:
        terminal.show(job.dry_run(job.prepare(settings, terminal.say), terminal.say), as_json)
        return
    folder = choose.folder(out, resume)
    try:
        found = job.run(settings, folder, resume, terminal.say, ["freqkd-train", *sys.argv[1:]])
    except KeyboardInterrupt:
        terminal.say(f"stopped; go on with: freqkd-train distill --resume --out {shlex.quote(str(folder))}")
        raise typer.Exit(130) from None
    if found:
        choose.show(found, as_json)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a `distill` run.")],
    checkpoint: Annotated[str, typer.Option(help="newest | best.")] = "newest",
    merge: Annotated[float | None, typer.Option(help="Another share of the change (default: the run's).")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Write student.onnx as well, checked on real images.")] = False,
    out: Annotated[Path | None, typer.Option(help="Where to (default: RUN).")] = None,
) -> None:
    """Write a run's student again, from another checkpoint, at another merge, or as ONNX.

    Example: freqkd-train export runs/2026-11-25-distill --merge 1 --out students/whole
    """
    from freqkd_analysis import terminal
    from freqkd_train import revisit

    for path in revisit.export_run(run, checkpoint, merge, onnx, out or run, terminal.say):
        print(path)


@app.command()
def replay(
    bundle: Annotated[Path, typer.Argument(help="A nonfinite-step-N folder inside a run.")],
    as_json: AsJson = False,
) -> None:
    """Run once more the step that a run stopped at, and tell its loss term by term.

    Example: freqkd-train replay runs/2026-11-25-distill/nonfinite-step-12
    """
    from freqkd_analysis import terminal
    from freqkd_train import revisit

    terminal.show(revisit.replay(bundle, terminal.say), as_json)


_DATA, _ARMS = "Data", "Arms and scale"
_METHODS = ("none", "mse", "cosine", "response", "freqkd", "measured", "shuffled", "ir_teacher", "grey", "rgb",
            "none_paper", "none_stage2", "freqkd_stage2", "paper_loss", "low_only", "high_only", "mse_high",
            "signed_high", "precision", "cutoff_10", "cutoff_25", "cutoff_75")  # fmt: skip
"""`arms.ARMS` by name, which help must not wait for; a test holds them together."""

_MODEL = {"resnet50": "Teacher alone, read at all its layers; the student stays a ResNet"}
"""What --model changes, where that is not the teacher and with it the student."""


def _study(recipe: str) -> Any:
    """The command of a downstream recipe: all of them take the same words."""

    def command(
        data: Annotated[str, option(panel=_DATA, help="LAYOUT:ROOT of annotated images, or synthetic.")] = "synthetic",
        distil_on: Annotated[
            str, option(panel=_DATA, help="LAYOUT:ROOT of pairs to distil on (default: the training split's).")
        ] = "",
        students: Annotated[
            Path | None, option(panel=_DATA, help="Folder of another study, whose distilled students are taken.")
        ] = None,
        allow_leak: Annotated[
            bool, option("--allow-leak", panel=_DATA, help="Go on, and record it, where the test split leaks.")
        ] = False,
        methods: Annotated[str, option(panel=_ARMS, help=f"Arms: some of {', '.join(_METHODS)}.")] = "none,mse,freqkd",
        controls: Annotated[bool, option("--controls", panel=_ARMS, help="The control arms as well.")] = False,
        seeds: Annotated[str, option(panel=_ARMS, help="Such as 0,1,2.")] = "0",
        preset: Annotated[str, option(panel=_ARMS, help="paper | compact | smoke.")] = "compact",
        model: str = "",
        weights: Annotated[str, option(panel=_ARMS, help="Of the model: auto | random | FILE.")] = "",
        changes: Annotated[
            list[str] | None,
            option(
                "--set",
                metavar="STAGE.KEY=VALUE",
                panel=_ARMS,
                help="Any setting of a stage: distil.training.epochs=3, finetune.select=test.",
            ),
        ] = None,
        device: Annotated[str, option(help="auto | cpu | cuda | cuda:N.")] = "auto",
        start: Annotated[str, option("--from", help="Redo from analyse | distil | finetune | evaluate on.")] = "",
        as_json: AsJson = False,
        out: Annotated[Path | None, option(help="Study folder; goes on when it exists (default: runs/RECIPE).")] = None,
    ) -> None:
        from freqkd_analysis import terminal
        from freqkd_train import arms, choose, study

        chosen = arms.Study(recipe, data, preset, arms.methods(methods, controls), choose.numbers(seeds), model,
                            weights, device, distil_on, str(students or ""), allow_leak,
                            tuple(changes or ()))  # fmt: skip
        folder = out or Path("runs") / recipe
        try:
            table = study.run(chosen, folder, terminal.say, ["freqkd-train", *sys.argv[1:]], start)
        except KeyboardInterrupt:
            terminal.say("stopped; what is done is kept. The same command, without --from, goes on")
            raise typer.Exit(130) from None
        choose.show_comparison(table, folder / "compare", as_json)

    # The one option that means another thing in another recipe; an annotation in text could not name `recipe`.
    networks = _MODEL.get(recipe, "Teacher and student, read at all layers")
    command.__annotations__["model"] = Annotated[str, option(panel=_ARMS, help=f"{networks} (default: the preset's).")]
    command.__doc__ = f"""Distil, fine-tune, evaluate and compare: {_ABOUT[recipe]}.

    Example: freqkd-train {recipe} --data synthetic --preset smoke
    """
    return command


_ABOUT = {
    "kaist": "pedestrians on KAIST",
    "flir": "persons, bicycles and cars on FLIR ADAS",
    "mfnet": "segmentation on MFNet with a frozen backbone",
    "resnet50": "the same as kaist with a ResNet-50 student of the ViT teacher",
}
for _name in _ABOUT:
    app.command(_name)(_study(_name))


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a fine-tuning.")],
    data: Annotated[str, typer.Option(help="LAYOUT:ROOT (default: the run's own test split).")] = "",
    split: Annotated[str, typer.Option(help="Split or list (default: the run's).")] = "",
    annotations: Annotated[str, typer.Option(help="Annotation set (default: the run's).")] = "",
    protocol: Annotated[str, typer.Option(help="kaist | coco (default: by the data).")] = "",
    draw: Annotated[int, typer.Option(min=0, help="Images on a contact sheet of the detections.")] = 0,
    allow_leak: Annotated[bool, typer.Option("--allow-leak", help="Go on where training images are in it.")] = False,
    device: Annotated[str, typer.Option(help="auto | cpu | cuda | cuda:N.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Where to (default: RUN/evaluation).")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict with a fine-tuned model and score it, the protocol's card inside.

    Example: freqkd-train evaluate runs/kaist/finetune/freqkd-0 --data kaist:KAIST
    """
    from freqkd_train import choose
    from freqkd_train import evaluate as stage

    folder = out or run / "evaluation"
    found = stage.run(run, folder, spec=data, split=split, annotation_set=annotations, protocol=protocol, device=device,
                      draw=draw, allow_leak=allow_leak)  # fmt: skip
    choose.show_metrics(found, folder, as_json)


@app.command()
def score(
    annotations: Annotated[Path, typer.Option(help="KAIST json, COCO json, or a folder of bbGt text.")],
    results: Annotated[list[Path], typer.Option(help="image,x,y,w,h,score lines or a COCO result list; repeatable.")],
    protocol: Annotated[str, typer.Option(help="kaist | coco (default: by the annotations).")] = "",
    style: Annotated[str, typer.Option(help="Of the miss rate: matlab | script.")] = "matlab",
    figures: Annotated[Path | None, typer.Option(help="Folder for the curves.")] = None,
    draw: Annotated[int, typer.Option(min=0, help="Images on a contact sheet of each file's detections.")] = 0,
    images: Annotated[Path | None, typer.Option(help="Where the images lie, for --draw.")] = None,
    out: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
) -> None:
    """Score anybody's detections: miss rate and AP; several files are compared with intervals.

    Example: freqkd-train score --annotations KAIST_annotation.json --results MLPD_result.txt --json report.json
    """
    from freqkd_train import choose
    from freqkd_train import score as scoring

    choose.check_drawing(draw, images, figures)
    read = scoring.read_annotations(annotations)
    runs = scoring.read_runs(results, read)
    print(scoring.text(scoring.scored(read, runs, protocol, style=style, out=out)))
    if figures is not None:
        choose.draw_scored(read, runs, protocol, style, figures, draw, images)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Folders of evaluations.")],
    force: Annotated[bool, typer.Option("--force", help="Go on where their cards differ, and say in what.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write CSV, Markdown, LaTeX and figure there.")] = None,
    as_json: AsJson = False,
) -> None:
    """Methods side by side: mean over seeds with intervals, paired differences to `none` and `mse`.

    Example: freqkd-train compare runs/kaist/evaluate/none-0 runs/kaist/evaluate/freqkd-0
    """
    from freqkd_train import choose
    from freqkd_train import compare as comparison

    table = comparison.compare(runs, force=force)
    if out is not None:
        comparison.write(table, out)
    choose.show_comparison(table, out, as_json)


@config_app.command("show")
def config_show(
    what: Annotated[str, typer.Argument(help="Recipe, YAML file or run folder.")] = "kaist",
    preset: Annotated[str, typer.Option(help="Scale of the recipe: paper | compact | smoke.")] = "compact",
) -> None:
    """Print whole settings as YAML, with every default.

    Example: freqkd-train config show ablation_cutoff:0.25
    """
    from freqkd_train import choose
    from freqkd_train import config as files

    print(files.text(choose.named(what, preset)), end="")


@config_app.command("diff")
def config_diff(
    a: Annotated[str, typer.Argument(help="Recipe, YAML file or run folder.")],
    b: Annotated[str, typer.Argument(help="Another one.")],
    preset: Annotated[str, typer.Option(help="Scale of the recipes: paper | compact | smoke.")] = "compact",
    as_json: AsJson = False,
) -> None:
    """Say which settings of two recipes, files or runs differ.

    Example: freqkd-train config diff kaist controls:shuffled
    """
    from freqkd_analysis import terminal
    from freqkd_train import choose
    from freqkd_train import config as files

    unlike = files.difference(choose.named(a, preset), choose.named(b, preset))
    terminal.show([{"setting": key, "a": x, "b": y} for key, (x, y) in unlike.items()], as_json)


@config_app.command("losses")
def config_losses(as_json: AsJson = False) -> None:
    """List the losses with their published weights and sources.

    Example: freqkd-train config losses
    """
    from freqkd_analysis import terminal
    from freqkd_train import choose

    terminal.show(choose.losses(), as_json)


@config_app.command("recipes")
def config_recipes(
    name: Annotated[str, typer.Argument(help="One recipe: its lab card.")] = "",
    as_json: AsJson = False,
) -> None:
    """List the recipes; with a name, its lab card.

    Example: freqkd-train config recipes controls
    """
    from freqkd_analysis import terminal
    from freqkd_train import recipes

    if name:
        recipes.make(name)
        print(recipes.card(name))
        return
    terminal.show(recipes.listing(), as_json)


@cache_app.command("list")
def cache_list(as_json: AsJson = False) -> None:
    """List stored teacher features and their size.

    Example: freqkd-train cache list
    """
    from freqkd_analysis import terminal
    from freqkd_train import teacher_cache

    terminal.show(teacher_cache.listing(teacher_cache.ROOT), as_json)


@cache_app.command("purge")
def cache_purge() -> None:
    """Remove all stored teacher features.

    Example: freqkd-train cache purge
    """
    from freqkd_analysis import terminal
    from freqkd_train import teacher_cache

    terminal.say(f"{teacher_cache.purge(teacher_cache.ROOT) / 1e9:.2f} GB freed")


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `freqkd-train`."""
    from freqkd_analysis import terminal

    terminal.run_app(app, arguments)


if __name__ == "__main__":
    main()
