"""The report: one inert offline file that shows the tables' numbers, whatever the run holds."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fake_run import fake_run
from rich.console import Console

from freqkd_analysis import schema
from freqkd_analysis.console import console_table, released_table
from freqkd_analysis.errors import RunError
from freqkd_analysis.methods_text import write_methods
from freqkd_analysis.report import write_report
from freqkd_analysis.runfolder import beside, number, read_run
from freqkd_analysis.terminal import print_run

NASTY = "set00/<script>alert(1)</script> & $x$ \"quoted'.jpg"
NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


class Page(HTMLParser):
    """Tags with attributes, visible text, and the bodies of scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self.inside == "script" else self.words).append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def report(folder: Path) -> str:
    return write_report(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> str:
    return report(fake_run(tmp_path_factory.mktemp("runs") / "whole", layers=12, bands=3))


def test_nothing_is_loaded_from_outside(html: str) -> None:
    assert set(re.findall(r"https?://[^\s\"'<>)]+", html)) <= NAMESPACES
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href", "xlink:href"):
            assert str(attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert "@import" not in html and "javascript:" not in html


def test_the_policy_allows_this_script_alone(html: str) -> None:
    page = Page(html)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'")
    assert len(page.scripts) == 1
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_markup_in_names_is_shown_as_text(tmp_path: Path) -> None:
    data = {"spec": f"folder:{NASTY}:b", "n": 40, "groups": 14, "skipped": [{"id": NASTY, "reason": NASTY}]}
    network = {"name": NASTY, "weights": NASTY, "trained": True, "note": NASTY}
    folder = fake_run(tmp_path, layers=2, data=data, network=network, command=["freqkd-analyze", NASTY])
    page = Page(report(folder))
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert page.text.count("alert(1)") >= 6 and NASTY in page.text
    methods = write_methods(folder).read_text(encoding="utf-8")
    assert "\\<script\\>" in methods and "<script>" not in methods


def test_markup_in_band_and_tap_names_stays_text_inside_figures(tmp_path: Path) -> None:
    tap = {"tap": "<b>$\\frac$", "grid": [16, 16], "stride": 14, "channels": 8}
    folder = fake_run(tmp_path, layers=2, taps=[{"layer": i} | tap for i in range(2)])
    weights = json.loads((folder / "band_weights.json").read_text())
    weights["bands"]["names"] = ["<i>low</i>", "$mid$", "high"]
    (folder / "band_weights.json").write_text(json.dumps(weights))
    summary = schema.read(folder / "summary.csv").replace({"band": {"low": "<i>low</i>", "mid": "$mid$"}})
    schema.write(summary, folder / "summary.csv")
    html = report(folder)
    assert not {"i", "script"} & {tag for tag, _ in Page(html).tags[:-1]}
    figures = Page(html[html.index("<figure") : html.rindex("</figure>")]).text
    assert "$mid$" in figures and "<i>low</i>" in figures
    assert "<b>$\\frac$" in Page(html).text


def test_identifiers_do_not_meet(html: str) -> None:
    found = [attributes["id"] for _, attributes in Page(html).tags if "id" in attributes]
    assert len(found) == len(set(found))
    targets = re.findall(r'(?:href="#|url\(#)([^")]+)', html)
    assert targets and set(targets) <= set(found)


def rows_of(html: str) -> list[list[str]]:
    body = html[html.index('<table id="layers">') : html.index("</table>", html.index('<table id="layers">'))]
    rows = re.findall(r"<tr data-condition=\"(\S+)\" data-measure=\"(\S+)\"([^>]*)>(.*?)</tr>", body, re.S)
    return [[c, m, more, *re.findall(r"<td data-value=\"([^\"]*)\"", cells)] for c, m, more, cells in rows]


def test_the_table_of_layers_holds_ratio_csv(html: str, tmp_path: Path) -> None:
    ratio = schema.read(fake_run(tmp_path, layers=12, bands=3) / "ratio.csv")
    ratio = ratio.set_index(["condition", "measure", "layer"])
    shown = rows_of(html)
    assert len(shown) == 2 * 6 * 13
    for condition, measure, more, layer, _tap, low, high, quotient, *_ in shown:
        name = "all" if float(layer) > 1e6 else str(int(float(layer)))
        row = ratio.loc[(condition, measure, name)]
        assert (float(low), float(high), float(quotient)) == (row["low"], row["high"], row["ratio"])
        assert ("hidden" in more) == ((condition, measure) != ("mean_removed", "cosine"))


def test_a_mean_removed_row_stands_beside_a_mean_removed_shift(tmp_path: Path) -> None:
    read = read_run(fake_run(tmp_path, layers=1))
    assert (read.nearest_shift("mean_removed"), read.nearest_shift("paired")) == ("shifted:1", "shifted:1")
    moved = read.ratio[read.ratio["condition"] == "shifted:2"].assign(condition="mean_removed_shifted:2", ratio=7.0)
    ratio = pd.concat([read.ratio, moved], ignore_index=True)
    schema.write(ratio, read.folder / "ratio.csv")
    read = read_run(read.folder)
    assert (read.nearest_shift("mean_removed"), read.nearest_shift("paired")) == ("mean_removed_shifted:2", "shifted:1")
    assert beside(read, "mean_removed", "0")["shifted"] == 7.0


def test_mse_never_stands_without_what_explains_it(html: str) -> None:
    side = ["mse ratio", "mse per mode ratio", "cosine ratio", "shifted ratio", "RGB energy low", "modes high"]
    assert all(f">{name}</button>" in html for name in side)
    for row in (r for r in rows_of(html) if r[1] == "mse"):
        assert all(value != "" for value in row[-8:])
    assert 'measure.startsWith("mse")' in html


def test_the_verdict_stands_on_top_with_its_interval(html: str) -> None:
    page = Page(html).text
    top = page[: page.index("Before you quote a number")]
    assert re.search(r"calibrated high / low = \d\S* \[\S+, \S+\] 95 % interval; 40 pairs in 14 groups", top)
    assert "misregistration alone (1.3 px), high / low 1.45" in top
    assert "not independent confirmations" in page


@pytest.mark.parametrize("calibrated, expected", [
    ((1.5, 1.2, 1.9), "supports"), ((0.6, 0.4, 0.8), "against"), ((1.1, 0.9, 1.4), "undetermined")])  # fmt: skip
def test_the_verdict_is_the_one_of_the_table(tmp_path: Path, calibrated: tuple[float, ...], expected: str) -> None:
    folder = fake_run(tmp_path, layers=2)
    ratio = schema.read(folder / "ratio.csv")
    ratio.loc[ratio["layer"] == "all", ["calibrated_ratio", "calibrated_ci_low", "calibrated_ci_high"]] = calibrated
    ratio.loc[ratio["layer"] == "all", "verdict"] = expected
    schema.write(ratio, folder / "ratio.csv")
    assert f'<p class="word">{expected}</p>' in report(folder)


def notices(html: str) -> str:
    return " ".join(re.findall(r'<p class="notice" role="alert">(.*?)</p>', html))


@pytest.mark.parametrize("changes, says", [
    ({"network": {"name": "freqkd_demo", "weights": "demo", "trained": True}}, "DEMO NETWORK"),
    ({"network": {"name": "vit", "weights": "random", "trained": False}}, "RANDOM WEIGHTS"),
    ({"network": {"name": "vit"}}, "WEIGHTS NOT RECORDED"),
    ({"data": {"spec": "synthetic:seed=1", "n": 4, "groups": 4}}, "SYNTHETIC SCENES"),
])  # fmt: skip
def test_a_stand_in_is_named_loudly(tmp_path: Path, html: str, changes: dict[str, Any], says: str) -> None:
    assert notices(html) == ""
    assert says in notices(report(fake_run(tmp_path, layers=1, **changes)))


@pytest.mark.parametrize("groups, says", [(9, "9 groups, fewer than 10"), (1, "pairs were resampled instead"),
                                          (None, "number of groups was not recorded")])  # fmt: skip
def test_few_groups_are_a_warning(tmp_path: Path, html: str, groups: int | None, says: str) -> None:
    assert says not in html
    assert says in report(fake_run(tmp_path, layers=1, data={"spec": "kit:x", "n": 40, "groups": groups}))


def test_missing_controls_and_tables_are_said_not_shown_empty(tmp_path: Path) -> None:
    folder = fake_run(tmp_path, layers=2, conditions=["paired"])
    for name in ("band_weights.json", "verdict.json", "convergence.csv", "spectra.parquet"):
        (folder / name).unlink()
    html = report(folder)
    text = Page(html).text
    assert "No ceiling (shuffled was not run)" in text and "mean_removed was not run" in text
    assert html.count("<svg") == 3 and "radial_profile : the run folder has no spectra.parquet" in text
    assert "Band weights for training" not in text
    assert '<p class="word">undetermined</p>' in html


def test_a_bare_manifest_gives_not_recorded_instead_of_an_error(tmp_path: Path) -> None:
    folder = fake_run(tmp_path, layers=1)
    tap = {"layer": 0, "tap": "blocks.0", "grid": [16, 16], "stride": 14, "channels": 8}
    needed = {"schema": 1, "config": {"bands": "linear:3"}, "data": {}, "taps": [tap]}
    (folder / "manifest.json").write_text(json.dumps(needed))
    text = Page(report(folder)).text
    assert text.count("not recorded") > 15
    methods = write_methods(folder).read_text()
    assert "not recorded pairs of visible" in methods and "None" not in methods


def test_methods_follow_the_settings(tmp_path: Path) -> None:
    methods = write_methods(fake_run(tmp_path, layers=2, bands=5)).read_text()
    for words in ("40 pairs", "14 groups", "vit\\_small" if "vit\\_small" in methods else "vit_small_patch14_dinov2",
                  "22,056,576 parameters", "448 x 448 pixels by crop", "was not applied", "linear:5", "draws: 2,000",
                  "b3 \\[0.424, 0.566)", "shifted (1, 2, 4, 8 px)", "torch 2.14.0", "seed 0"):  # fmt: skip
        assert words in methods, words


def test_methods_say_where_the_mean_maps_come_from(tmp_path: Path) -> None:
    methods = write_methods(fake_run(tmp_path / "a", layers=1)).read_text()
    assert "over at most 10 pairs, spread over the groups, of the other fold" in methods  # control_pairs is 20
    assert "two folds" in methods and "no group enters its own mean" in methods
    assert "over the sample" not in methods
    alone = write_methods(fake_run(tmp_path / "b", layers=1, conditions=["paired", "shuffled"])).read_text()
    assert "folds" not in alone


@pytest.mark.parametrize("window, conditions, said", [
    ("none", None, False), ("hann", None, True), ("dct", None, True), ("hann", ["paired"], False)])  # fmt: skip
def test_methods_say_that_pixels_have_no_window(
    tmp_path: Path, window: str, conditions: list[str] | None, said: bool
) -> None:
    folder = fake_run(tmp_path, layers=1, conditions=conditions)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["window"] = window
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert ("window was not applied to the pixels control" in write_methods(folder).read_text()) == said


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = (report(fake_run(tmp_path / name / "run", layers=3)) for name in ("a", "b"))
    assert first == second


def test_twenty_four_layers_stay_small(tmp_path: Path) -> None:
    path = write_report(fake_run(tmp_path, layers=24, bands=5))
    assert path.stat().st_size < 2_000_000  # the promise is 5 MB


def test_one_layer_two_bands(tmp_path: Path) -> None:
    html = report(fake_run(tmp_path, layers=1, bands=2))
    assert html.count("<svg") == 7 and len(rows_of(html)) == 2 * 6 * 2


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no manifest\.json in"):
        write_report(tmp_path)
    folder = fake_run(tmp_path / "run", layers=1)
    (folder / "manifest.json").write_text("[")
    with pytest.raises(RunError, match="not readable JSON"):
        write_report(folder)


def render(folder: Path, **options: Any) -> str:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(console_table(folder, **options))
    console.file.close()
    return console.export_text()


def test_the_console_table_has_a_row_a_layer_and_all_last(tmp_path: Path) -> None:
    folder = fake_run(tmp_path, layers=3, network={"name": "[red]vit[/red]", "weights": "w"})
    lines = [line for line in render(folder).splitlines() if line.startswith("│")]
    assert [line.split("│")[1].strip() for line in lines] == ["0", "1", "2", "all"]
    assert "[red]vit[/red] (w): mean_removed, cosine, 40 pairs in 14 groups" in render(folder)
    row = schema.read(folder / "ratio.csv").query("condition == 'mean_removed' and measure == 'cosine'").iloc[-1]
    assert f"{row['ratio']:#.3g} [" in lines[-1] and row["verdict"] in lines[-1]
    assert "modes low, high" in render(folder, measure="mse") and "modes" not in render(folder)
    with pytest.raises(RunError, match='Did you mean "cosine"'):
        console_table(folder, measure="cosin")


@pytest.mark.parametrize("preset, shown", [("paper", True), (None, False), ("", False)])
def test_the_preset_paper_shows_the_released_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], preset: str | None, shown: bool
) -> None:
    folder = fake_run(tmp_path, layers=2)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["preset"] = preset
    (folder / "manifest.json").write_text(json.dumps(manifest))
    print_run(folder)
    out = capsys.readouterr().out
    assert ("nmse high / low" in out) == shown
    assert "calibrated" in out, "the main table stays"
    if not shown:
        return
    lines = [line.split() for line in re.sub("[│┃]", " ", out[out.index("FreqKD release") :]).splitlines()]
    lines = [cells for cells in lines if len(cells) == 10]
    ratio = schema.read(folder / "ratio.csv").query("condition == 'paired'").set_index(["layer", "measure"])
    for cells, layer in zip(lines, ("0", "1", "all"), strict=True):
        expected = [ratio.loc[(layer, m), c] for m in ("mse", "nmse", "cosine") for c in ("low", "high", "ratio")]
        assert cells == [layer, *map(number, expected)]


def test_the_released_table_without_its_rows(tmp_path: Path) -> None:
    folder = fake_run(tmp_path, layers=1)
    ratio = schema.read(folder / "ratio.csv")
    schema.write(ratio[ratio["measure"] != "nmse"], folder / "ratio.csv")
    table = released_table(folder)
    assert [next(iter(column.cells)).plain for column in table.columns[4:7]] == ["–"] * 3
    schema.write(ratio[ratio["condition"] != "paired"], folder / "ratio.csv")
    with pytest.raises(RunError, match="no rows of condition paired"):
        released_table(folder)


def test_tables_that_summarize_wrote_are_understood(tmp_path: Path) -> None:
    from freqkd_analysis.summary import summarize

    folder = fake_run(tmp_path, layers=3, bands=3, pairs=6, groups=3)
    for name in ("summary.csv", "ratio.csv", "convergence.csv", "band_weights.json", "verdict.json"):
        (folder / name).unlink()
    verdict = summarize(folder, draws=60)
    html = report(folder)
    page = Page(html).text
    assert html.count("<svg") == 6 and "one sample size only" in html
    assert f'<p class="word">{verdict["verdict"]}</p>' in html
    assert verdict["warnings"][0][1:] in page
    shown = pd.DataFrame(rows_of(html))
    assert set(shown[0]) == {"paired", "mean_removed"} and "energy_rgb" not in set(shown[1])
    assert "draws: 60" in write_methods(folder).read_text()


@pytest.mark.browser
def test_the_page_sorts_and_switches_without_a_console_error(tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("browser: no chromium on this machine")
    path = write_report(fake_run(tmp_path, layers=3))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command = [browser, *options, f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert 'id="controls"' in done.stdout and 'id="controls" hidden' not in done.stdout, "the script did not run"
    assert 'id="layers" class="no-bands no-side"' in done.stdout
    assert "Content Security Policy" not in done.stderr and "CONSOLE" not in done.stderr
