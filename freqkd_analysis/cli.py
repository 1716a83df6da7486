"""`freqkd-analyze`: options in, one call, files and a table out. No formula lives here; heavy imports wait until used.

Data goes to stdout, talk to stderr. Exit status: 0 done, 1 a check failed, 2 wrong use or input, 130 interrupted.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from freqkd_analysis.commands import AsJson, application, option
from freqkd_analysis.errors import FreqkdError

app = application(
    "freqkd-analyze",
    "Where, at which layer and spatial frequency, do visible and infrared features of a network differ?",
)
data_app = typer.Typer(no_args_is_help=True, help="Data sets: list, verify, synthesise.")
app.add_typer(data_app, name="data")

_INPUT, _NETWORK, _SPECTRA, _CONTROLS, _MACHINE = (
    "What to measure", "Network", "Spectra and measures", "Controls and sampling", "Machine",
)  # fmt: skip

MEASURES = "all, or some of cosine, relative, nmse, mse, mse_per_mode, log_spectral."

RunFolder = Annotated[Path, typer.Argument(help="Folder of a finished `layers` run.")]


@app.command()
def layers(
    context: typer.Context,
    pairs: Annotated[int, option(panel=_INPUT, min=1, help="Pairs to measure.")] = 500,
    data: Annotated[str, option(panel=_INPUT, help="LAYOUT:ROOT, see `data list`.")] = "synthetic",
    size: Annotated[str, option(panel=_INPUT, help="Network input, px: N or ROWSxCOLUMNS.")] = "224",
    geometry: Annotated[str, option(panel=_INPUT, help="crop | pad (zeros right and bottom).")] = "crop",
    model: Annotated[str, option(panel=_NETWORK, help="timm name, freqkd_demo, or auto.")] = "auto",
    weights: Annotated[str, option(panel=_NETWORK, help="auto | pretrained | random | FILE.")] = "auto",
    layers: Annotated[str, option(panel=_NETWORK, help="all | 7,15,19 | glob such as blocks.*.attn.")] = "all",
    norm: Annotated[bool, option("--norm/--no-norm", panel=_NETWORK, help="Final norm on every layer.")] = False,
    standardize: Annotated[str, option(panel=_SPECTRA, help="none | token | channel | released.")] = "none",
    window: Annotated[str, option(panel=_SPECTRA, help="none | hann | dct.")] = "none",
    bands: Annotated[
        str,
        option(
            panel=_SPECTRA,
            help="octave:K, linear:K, equal-modes:K, paper, split:C, released:C "
            "or edges such as 0.1,0.25 (cycles per token).",
        ),
    ] = "octave:3",
    measure: Annotated[str, option(panel=_SPECTRA, help=MEASURES)] = "all",
    conditions: Annotated[
        str,
        option(
            panel=_CONTROLS,
            metavar="LIST|none|all",
            help="Beside `paired`: shuffled, mean_removed, shifted:PX, grey, inverted, blur, noise, random, pixels, "
            "without_artefacts.",
        ),
    ] = "all",
    cka: Annotated[bool, option(panel=_SPECTRA, help="Debiased CKA of each band over the control pairs.")] = False,
    mmd: Annotated[bool, option(panel=_SPECTRA, help="Squared MMD of each band over the control pairs.")] = False,
    control_pairs: Annotated[
        int, option(panel=_CONTROLS, min=2, help="Pairs that image controls and mean maps are measured on.")
    ] = 100,
    sample: Annotated[str, option(panel=_CONTROLS, help="stratified | random | first.")] = "stratified",
    seed: Annotated[int, option(panel=_CONTROLS, min=0, help="Of sampling, noise, random weights, resampling.")] = 0,
    batch_size: Annotated[str, option(panel=_MACHINE, metavar="N|auto", help="Pairs at once.")] = "auto",
    device: Annotated[str, option(panel=_MACHINE, help="auto | cpu | cuda | cuda:N.")] = "auto",
    dtype: Annotated[str, option(panel=_MACHINE, help="fp32 | bf16 (network alone; spectra stay fp32).")] = "fp32",
    workers: Annotated[int, option(panel=_MACHINE, min=0, help="Threads that decode images.")] = 2,
    max_bad: Annotated[int, option(min=0, help="Unreadable pairs to leave out before failing.")] = 10,
    preset: Annotated[str, option(help="paper: the FreqKD release's analysis.")] = "",
    resume: Annotated[bool, option(help="Finish the interrupted run in --out; same options as before.")] = False,
    dry_run: Annotated[bool, option(help="Say time, memory and disk from one batch.")] = False,
    as_json: Annotated[bool, option("--json", help="The verdict as JSON on stdout.")] = False,
    out: Annotated[Path | None, option(help="Run folder (default: runs/TIME-layers).")] = None,
) -> None:
    """Measure, layer by layer and band by band, how far visible and infrared features diverge.

    Example: freqkd-analyze layers --pairs 500 --data folder:scenes/visible:scenes/infrared --model resnet50
    """
    from freqkd_analysis import layers as job
    from freqkd_analysis import options, terminal

    given = {name for name in context.params if str(context.get_parameter_source(name)).endswith("COMMANDLINE")}
    settings, machine = options.settings(context.params, given), options.machine(context.params)
    if dry_run:
        made = job.prepare(settings, machine, terminal.say)
        terminal.show(job.dry_run(made), as_json)
        return
    folder = out or terminal.fresh_folder(resume)
    try:
        verdict = job.run(
            settings, machine, folder, resume, terminal.say, terminal.progress, ["freqkd-analyze", *sys.argv[1:]]
        )
    except KeyboardInterrupt:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        words += ["--resume"] if out else ["--resume", "--out", str(folder)]
        terminal.say(f"stopped; what is measured is kept. Go on with: {shlex.join(['freqkd-analyze', *words])}")
        raise typer.Exit(130) from None
    if verdict is None:
        return
    if as_json:
        print(json.dumps(verdict | {"run": str(folder)}))
        return
    terminal.print_run(folder)


@app.command()
def models(
    pattern: Annotated[str, typer.Argument(help='Name or glob, such as "vit_small*"; empty: those at hand.')] = "",
    size: Annotated[str, typer.Option(help="Network input, px.")] = "224",
    as_json: AsJson = False,
) -> None:
    """List networks that can be tapped and whose weights are at hand; with one name, its layers.

    Example: freqkd-analyze models resnet50
    """
    from freqkd_analysis import inspection, options, terminal

    if pattern and not any(mark in pattern for mark in "*?["):
        terminal.show(inspection.network(pattern, options.size(size)), as_json)
        return
    rows = inspection.networks(pattern, options.size(size))
    if not rows:
        raise FreqkdError(f'no network matches "{pattern}"; expected a timm name or glob such as "vit_small*".')
    terminal.show(rows, as_json)


@data_app.command("list")
def data_list(as_json: AsJson = False) -> None:
    """List the layouts that --data takes.

    Example: freqkd-analyze data list
    """
    from freqkd_analysis import terminal
    from freqkd_analysis.data.layouts import LAYOUTS

    terminal.show([{"layout": name, "use": layout.usage, "about": layout.about,
                   "published pairs": ", ".join(f"{n} {what}" for n, what in layout.published.items())}
                  for name, layout in LAYOUTS.items()], as_json)  # fmt: skip


@data_app.command("verify")
def data_verify(
    spec: Annotated[str, typer.Argument(help="As for --data.")],
    registration: Annotated[bool, typer.Option("--registration/--no-registration", help="Measure shifts.")] = True,
    as_json: AsJson = False,
) -> None:
    """Check a data set: counts, partners, corruption, sizes, duplicates, registration. Exit status 1 if wrong.

    Example: freqkd-analyze data verify folder:scenes/visible:scenes/infrared
    """
    from freqkd_analysis import terminal
    from freqkd_analysis.data import verify

    with terminal.counting("checking", "pairs") as count:
        report = verify.verify(spec, registration=registration, progress=count)
    print(json.dumps(report) if as_json else verify.text(report))
    if report["problems"]:
        raise typer.Exit(1)


@data_app.command("synth")
def data_synth(
    out: Annotated[Path, typer.Argument(help="New folder.")],
    layout: Annotated[str, typer.Option(help="kaist | flir | mfnet | folder.")] = "folder",
    options: Annotated[str, typer.Option(help="Such as pairs=40,groups=8,size=320x256,shift=2:0.")] = "",
) -> None:
    """Write synthetic scenes in the layout of a real data set.

    Example: freqkd-analyze data synth scenes --layout kaist --options pairs=40,groups=8
    """
    from freqkd_analysis import terminal
    from freqkd_analysis.data import synthetic

    with terminal.counting("rendering", "pairs") as count:
        synthetic.write(out, layout, options, progress=count)
    terminal.say(f"written: {out}")


@app.command()
def summarize(
    run: RunFolder,
    bands: Annotated[str, typer.Option(help="Other bands, from the stored spectra; as for `layers`.")] = "",
    measure: Annotated[str, typer.Option(help=MEASURES)] = "all",
    floor: Annotated[str, typer.Option(help="none | noise | shifted | shifted:PX.")] = "none",
    out: Annotated[Path | None, typer.Option(help="Where to (default: RUN; told otherwise, a folder in it).")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a run's tables again; with other bands, measures or floor in a folder of their own. No network is needed.

    Example: freqkd-analyze summarize runs/2026-11-25-layers --bands linear:4
    """
    from freqkd_analysis import options, summary, terminal

    measures = options.measures(measure) or None
    folder = out or summary.target_folder(run, bands, measures, floor)
    verdict = summary.summarize(run, bands=bands or None, measures=measures, floor=floor, out=folder)
    if as_json:
        print(json.dumps(verdict))
        terminal.say(str(folder))
        return
    terminal.print_run(folder)


@app.command()
def figures(run: RunFolder) -> None:
    """Draw a run's figures again from its tables.

    Example: freqkd-analyze figures runs/2026-11-25-layers
    """
    from freqkd_analysis.figures import write_figures

    for path in write_figures(run):
        print(path)


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html and methods.md again from a run's tables.

    Example: freqkd-analyze report runs/2026-11-25-layers
    """
    from freqkd_analysis.methods_text import write_methods
    from freqkd_analysis.report import write_report

    print(write_methods(run))
    print(write_report(run))


@app.command()
def compare(
    run_a: RunFolder,
    run_b: RunFolder,
    measure: Annotated[str, typer.Option(help="Measure to show.")] = "cosine",
    condition: Annotated[str, typer.Option(help="Condition to show.")] = "paired",
    as_json: AsJson = False,
) -> None:
    """Differences A - B of two runs, layer by layer and band by band, with intervals.

    Example: freqkd-analyze compare runs/trained runs/random
    """
    from freqkd_analysis import terminal
    from freqkd_analysis.comparison import compare as difference

    table = difference(run_a, run_b)
    chosen = table[(table["measure"] == measure) & (table["condition"] == condition)]
    if chosen.empty:
        raise FreqkdError(
            f"the runs share no {condition}/{measure}; conditions {', '.join(sorted(set(table['condition'])))}."
        )
    terminal.show(chosen.drop(columns=["measure", "condition"]).to_dict("records"), as_json)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed and at hand: versions, devices, weights, data, disk.

    Example: freqkd-analyze doctor
    """
    from freqkd_analysis import inspection, terminal

    terminal.show(inspection.doctor(), as_json)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `freqkd-analyze`."""
    from freqkd_analysis import terminal

    terminal.run_app(app, arguments)


if __name__ == "__main__":
    main()
