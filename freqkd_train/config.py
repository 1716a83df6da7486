"""The settings of one distillation: frozen, strict, in YAML and back.

An unknown key is refused with the nearest known one; checks across fields happen once, here. Every number a recipe
sets is a default of a field below or a keyword in its function: nothing is read from anywhere else.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from freqkd_analysis import provenance, schema, shards
from freqkd_analysis.errors import FreqkdError, RunError, nearest
from freqkd_train import yaml_text
from freqkd_train.yaml_text import SETTINGS_CAP, NoYaml

S = TypeVar("S", bound="Section")


class ConfigError(FreqkdError):
    """Settings that are unknown, of the wrong kind, or do not go together."""


class Section(BaseModel):
    """Frozen, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Photometry(Section):
    """Random photometric change of one modality; each value is the largest deviation, 0 for none.

    brightness: additive, of the full range. contrast: factor 1 +- value around the image's mean. noise: standard
    deviation, of the full range.
    """

    brightness: float = Field(0.0, ge=0, le=1)
    contrast: float = Field(0.0, ge=0, lt=1)
    noise: float = Field(0.0, ge=0, le=1)


class Data(Section):
    """Pairs, their split, and the geometry both images share.

    spec: as for `freqkd-analyze layers --data`. holdout: share of the pairs kept out of training, in whole groups.
    exclude: a text file of pair ids, one a line, that must not be trained on. limit: use so many pairs, 0 for all.
    geometry: `crop` or `pad` as in the analysis. flip: probability of a joint mirror. scale: range of the area share
    of a joint random crop; (1, 1) for none. pairing: `shuffled` gives each infrared image the visible image of
    another group. teacher_input: what the teacher sees of the pair.
    """

    spec: str = "synthetic"
    holdout: float = Field(0.2, ge=0, lt=1)
    exclude: str = ""
    limit: int = Field(0, ge=0)
    size: tuple[int, int] = (224, 224)
    geometry: Literal["crop", "pad"] = "crop"
    flip: float = Field(0.5, ge=0, le=1)
    scale: tuple[float, float] = (1.0, 1.0)
    rgb: Photometry = Photometry()
    ir: Photometry = Photometry()
    pairing: Literal["paired", "shuffled"] = "paired"
    teacher_input: Literal["rgb", "grey", "ir"] = "rgb"
    workers: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _range(self) -> Self:
        low, high = self.scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"expected data.scale LOW,HIGH with 0 < LOW <= HIGH <= 1, got {low},{high}")
        if min(self.size) < 1:
            raise ValueError(f"expected data.size of at least 1x1, got {self.size[0]}x{self.size[1]}")
        if self.geometry == "pad" and self.scale != (1.0, 1.0):
            raise ValueError("expected data.scale 1,1 with data.geometry pad; a random crop would cut the padding")
        return self


class Teacher(Section):
    """The frozen network. layers: as for `freqkd-analyze layers --layers`. norm: its final norm on every tap."""

    name: str = "auto"
    weights: str = "auto"
    layers: str = "all"
    norm: bool = False


class Student(Section):
    """The trained network.

    name: empty for the teacher's own. weights: as for the teacher, or `mix:SHARE:FILE` for SHARE * pretrained +
    (1 - SHARE) * FILE. layers: as for the teacher; as many as the teacher's are paired in order, otherwise by relative
    depth. adapt: `lora`, `full`, `last:K` blocks, `head` (projectors alone), or `auto` (LoRA where the network has the
    targets, else full). rank, alpha, dropout, targets: of LoRA. merge: share of the change that the exported student
    keeps, 0 to 1; without a value 0.5, and 1 from random weights.
    """

    name: str = ""
    weights: str = "auto"
    layers: str = "all"
    adapt: str = "auto"
    rank: int = Field(16, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: tuple[str, ...] = ("qkv", "fc1", "fc2")
    merge: float | None = Field(None, ge=0, le=1)

    @model_validator(mode="after")
    def _ways(self) -> Self:
        if not re.fullmatch(r"auto|lora|full|head|last:[1-9][0-9]*", self.adapt):
            raise ValueError(f'expected student.adapt auto, lora, full, head or last:K, got "{self.adapt}"')
        if self.weights == "random" and self.merge not in (None, 1.0):
            raise ValueError(f"student.merge {self.merge} would mix in random weights; a student from random weights "
                             "needs student.merge 1 (--merge 1)")  # fmt: skip
        return self


class Loss(Section):
    """What is minimised.

    name: a preset of FreqKD or a baseline (`freqkd-train config losses`). bands, standardize, forms, weights: override
    a preset's, forms and weights one a band. weights_from: run folder of the analysis (for `measured`). rule: which of
    its weights. normalize: `band` divides each band by the teacher's energy in it. weight: of the whole loss, instead
    of its published default. match_gradient: scale to the gradient norm of this FreqKD preset at step 0, empty for
    none.
    """

    name: str = "released"
    bands: str = ""
    standardize: str = ""
    forms: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    weights_from: str = ""
    rule: Literal["shared", "precision"] = "shared"
    normalize: Literal["none", "band"] = "none"
    weight: float | None = Field(None, gt=0)
    match_gradient: str = ""


class Training(Section):
    """The loop. batch: pairs a step over all processes, taken in `accumulate` parts. warmup: steps, or a share of all
    steps when below 1. clip: largest gradient norm, 0 for none. layer_decay: factor a block from the last to the
    first. ema: decay of the averaged weights, 0 for none. checkpoint_every: steps, 0 for each epoch's end. best:
    a held-out metric, such as `val/loss`. track: tensorboard, wandb, mlflow. cache_gb: room for the teacher's
    features, 0 for no cache.
    """

    epochs: int = Field(12, ge=0)
    batch: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    lr: float = Field(2e-4, gt=0)
    weight_decay: float = Field(1e-4, ge=0)
    warmup: float = Field(0.05, ge=0)
    warmup_start: float = Field(0.01, ge=0, le=1)
    min_lr: float = Field(1e-7, ge=0)
    clip: float = Field(1.0, ge=0)
    layer_decay: float = Field(1.0, gt=0, le=1)
    ema: float = Field(0.0, ge=0, lt=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    checkpoint_every: int = Field(0, ge=0)
    keep: int = Field(2, ge=1)
    best: str = "val/loss"
    log_every: int = Field(1, ge=1)
    track: tuple[str, ...] = ()
    cache_gb: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _parts(self) -> Self:
        if self.accumulate > self.batch:
            raise ValueError(f"expected training.accumulate of at most training.batch {self.batch}, "
                             f"got {self.accumulate}")  # fmt: skip
        return self


class Config(Section):
    """One whole experiment. recipe: the recipe it came from, for the record."""

    recipe: str = ""
    seed: int = Field(0, ge=0)
    data: Data = Data()
    teacher: Teacher = Teacher()
    student: Student = Student()
    loss: Loss = Loss()
    training: Training = Training()

    @model_validator(mode="after")
    def _together(self) -> Self:
        if self.loss.name == "measured" and not self.loss.weights_from:
            raise ValueError("the loss `measured` needs a run of the analysis: --weights-from RUN")
        if self.loss.weights_from and self.loss.name != "measured":
            raise ValueError(f"--weights-from goes with the loss `measured`, got `{self.loss.name}`")
        if self.loss.normalize == "band" and self.loss.name != "measured":
            raise ValueError("loss.normalize band needs the energies of a run: use the loss `measured`")
        if self.loss.rule != "shared" and self.loss.name != "measured":
            raise ValueError(f"loss.rule {self.loss.rule} chooses among the weights of a run: use the loss `measured`, "
                             f"got `{self.loss.name}`")  # fmt: skip
        if self.loss.match_gradient and self.loss.name == "none":
            raise ValueError(
                f"loss.match_gradient {self.loss.match_gradient} scales a loss, and the loss `none` is none"
            )
        if self.training.cache_gb and self.data.scale != (1.0, 1.0):
            raise ValueError("a teacher cache holds whole views, plain and mirrored: it needs data.scale 1,1")
        if self.training.cache_gb and (self.data.rgb != Photometry() or self.data.pairing != "paired"):
            raise ValueError("a teacher cache needs the teacher's image unchanged: data.rgb without photometry, "
                             "data.pairing paired")  # fmt: skip
        return self

    def updated(self, changes: Mapping[str, Any]) -> Config:
        """A copy with dotted keys set, all checks run again.

        Raises: ConfigError for an unknown key (with the nearest) or a value that does not fit.

        Example:
            >>> Config().updated({"training.lr": 0.001, "seed": 3}).training.lr
            0.001
            >>> Config().updated({"training.epoch": 3})
            Traceback (most recent call last):
            ...
            freqkd_train.config.ConfigError: no setting "training.epoch". Did you mean "training.epochs"?
        """
        return updated(self, changes)


def updated(settings: S, changes: Mapping[str, Any], say: str = "") -> S:
    """A copy of settings of any kind with dotted keys set, all checks run again; `say` stands before a key in errors.

    Raises: ConfigError for an unknown key (with the nearest) or a value that does not fit.
    """
    tree = settings.model_dump()
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        node: Any = tree
        for part in path:
            node = node.get(part) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise ConfigError(f'no setting "{say}{dotted}".{nearest(dotted, all_keys(type(settings)))}')
        node[last] = value
    return parsed(type(settings), tree)


def all_keys(section: type[BaseModel] = Config, prefix: str = "") -> list[str]:
    """Every dotted key, in order."""
    return list(_keys(section, prefix))


def _keys(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def parse(tree: Mapping[str, Any]) -> Config:
    """Settings from nested mappings. Raises ConfigError: one line, the first thing that is wrong."""
    return parsed(Config, tree)


def parsed(kind: type[S], tree: Mapping[str, Any], path: Path | None = None) -> S:
    """Settings of a kind from nested mappings; the error names the file, where there is one."""
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError(f"{f'{path}: ' if path else ''}{_told(error, kind)}") from None


def _told(error: ValidationError, section: type[BaseModel]) -> str:
    told = error.errors()[0]
    where = ".".join(str(part) for part in told["loc"] if not isinstance(part, int))
    if told["type"] == "extra_forbidden":
        return f'no setting "{where}".{nearest(where, all_keys(section))}'
    message = str(told["msg"]).removeprefix("Value error, ")
    message, got = message[:1].lower() + message[1:], yaml_text.cut(repr(told["input"]))
    return f"{where}: {message}, got {got}." if where and told["type"] != "value_error" else f"{message}."


def read(path: Path) -> Config:
    """Settings from a YAML file. Raises ConfigError naming the file."""
    return parsed(Config, tree(path), path)


def tree(path: Path) -> dict[str, Any]:
    """Nested mappings from a YAML file. Raises ConfigError naming the file."""
    if not path.is_file():
        raise ConfigError(f"no settings file {path}; expected YAML such as a run's config.yaml.")
    with path.open("rb") as handle:
        content = handle.read(SETTINGS_CAP + 1)
    if len(content) > SETTINGS_CAP:
        raise ConfigError(f"{path} is no settings file: it holds more than {SETTINGS_CAP >> 10} KiB.")
    try:
        found = yaml_text.loaded(content)
    except NoYaml as error:
        raise ConfigError(f"{path} {error}.") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: expected settings such as `loss: {{name: released}}`, got {type(found).__name__}.")
    return found


def text(config: Section) -> str:
    """The settings as YAML; `read` of it gives them back.

    Example:
        >>> "name: released" in text(Config())
        True
    """
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def write(path: Path, config: Section) -> None:
    """The settings as a YAML file, whole or not at all."""
    schema.write_text(path, text(config))


def assignment(word: str) -> tuple[str, Any]:
    """`KEY=VALUE` of --set, the value read as YAML.

    Example:
        >>> assignment("data.size=[64, 96]"), assignment("loss.forms=[mse, cosine]")
        (('data.size', [64, 96]), ('loss.forms', ['mse', 'cosine']))
    """
    key, equals, value = word.partition("=")
    if not equals or not key:
        raise ConfigError(f'expected --set KEY=VALUE, got "{word}".')
    try:
        return key.strip(), yaml_text.value(value)
    except NoYaml:
        raise ConfigError(f"--set {key}: {yaml_text.cut(value)} is no YAML value.") from None


def difference(a: S, b: S) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with both values."""
    return {key: (x, y) for key in all_keys(type(a)) if (x := _at(a, key)) != (y := _at(b, key))}


def flat(settings: Section) -> dict[str, Any]:
    """Dotted key -> value, plain types."""
    return {key: provenance.plain(_at(settings, key)) for key in all_keys(type(settings))}


PLACE = ("config.yaml", "manifest.json")
"""The files that an interrupted and a finished run have."""


def claim(out: Path, settings: Section, resume: bool, free: Collection[str] = ()) -> None:
    """Make a run folder with its config.yaml, or check that the one there has the same settings but for `free` keys.

    Raises: RunError for a folder with anything in it (without resume), without settings, or with others.
    """
    path = out / "config.yaml"
    shards.check_place(out, resume, *PLACE)
    if resume:
        unlike = difference(parsed(type(settings), tree(path), path), settings)
        for key, (stored, now) in unlike.items():
            if key not in free:
                raise RunError(f"{out} was started with {key} = {stored}, now {now}; give the same settings or another "
                               "--out.")  # fmt: skip
        return
    write(path, settings)


def _at(config: Section, dotted: str) -> Any:
    node: Any = config
    for part in dotted.split("."):
        node = getattr(node, part)
    return node
