"""`t5vae plot`: which curves, over which scales, and that what is drawn shows what there is."""

import math
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from t5vae.common.errors import UserError
from t5vae.metrics.panels import Scale, alone, plan, thin, tick_label, trend
from t5vae.metrics.picture import write_picture
from t5vae.metrics.reading import Curve
from t5vae.metrics.terminal import draw

SPIKE = {"position": 9, "event": "nats_per_token 9 is a spike (usually 2)"}
SKIP = {"position": 9, "event": "the loss of rank 1 is not finite: skipped"}


@pytest.fixture
def run(lines, write):
    """Its steps 290 and 300 have no loss, and it has a spike."""
    made = lines()
    made[20] |= SPIKE
    made[28] |= {"loss": None}
    made[29] |= {"loss": None, **SKIP}
    return write("run", made)


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Draws runs; the figure that was written."""

    def make(*arguments) -> Figure:
        kept = []
        save = Figure.savefig

        def keep(self, *args, **how):
            kept.append(self)
            save(self, *args, **how)

        monkeypatch.setattr(Figure, "savefig", keep)
        write_picture(plan(*arguments), tmp_path / "curves.svg")
        return kept[0]

    return make


def test_a_curve_has_a_gap_where_a_value_is_null_and_none_where_it_was_not_logged(run):
    loss, valid = plan([str(run)], ["loss", "eval/valid"], "step").panels
    curve = loss.lines[0].curve
    assert list(curve.x) == list(range(10, 501, 10))
    assert [curve.x[n] for n in np.flatnonzero(np.isnan(curve.y))] == [290, 300]
    assert list(valid.lines[0].held_out.x) == [100, 200, 300, 400, 500]
    assert valid.lines[0].curve is None


def test_what_is_drawn_by_default_is_what_there_is(run, write):
    keys = [panel.key for panel in plan([str(run)], None, "step").panels]
    assert keys == ["loss", "nats_per_token", "mmd", "eval/valid"]
    with pytest.raises(UserError, match="choose by --key: other, step"):
        plan([str(write("other", [{"step": 1, "other": 2}]))], None, "step")


def test_a_copy_of_the_metrics_alone_is_drawn_the_same(run, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((run / "metrics.jsonl").read_bytes())
    (of_run,), (of_copy,) = (plan([str(p)], ["mmd"], "step").panels for p in (run, copy))
    assert list(of_run.lines[0].curve.y) == list(of_copy.lines[0].curve.y)


@pytest.mark.parametrize(
    ("x", "first", "last"), [("step", 10, 500), ("consumed", 640, 32000), ("hours", 0, 98 / 3600)]
)
def test_curves_and_events_run_over_what_is_asked_for(run, x, first, last):
    line = plan([str(run)], ["loss"], x).panels[0].lines[0]
    assert (line.curve.x[0], line.curve.x[-1]) == pytest.approx((first, last))
    assert [event.x for event in line.events] == [line.curve.x[20], line.curve.x[29]]


@pytest.mark.parametrize(
    ("values", "key", "kind"),
    [
        ([5, 1], "loss", "linear"),
        ([5, 0.1], "loss", "log"),
        ([5, 0.1], "eval/nats_per_token", "log"),
        ([5, None, 0.1], "loss", "log"),
        ([0.2, 0.01, -0.002], "mmd", "asinh"),
        ([0.2, 0.01, -0.1], "mmd", "linear"),
        ([0.9, 0.001], "eval/valid", "linear"),
        ([1, 1], "loss", "linear"),
        ([0, 0], "mmd", "linear"),
    ],
)
def test_a_logarithm_where_it_shows_more(write, values, key, kind):
    run = write("run", [{"step": n, key: value} for n, value in enumerate(values)])
    assert plan([str(run)], [key], "step").panels[0].scale.kind == kind


def test_ticks_are_round_and_few():
    assert Scale("log", 0.9, 12).ticks == pytest.approx([1, 2, 5, 10])
    assert Scale("asinh", -0.01, 0.5, 0.01).ticks == pytest.approx(
        [0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5]
    )
    assert len(Scale("log", 1e-3, 1e30).ticks) <= 10
    assert [tick_label(tick) for tick in (0.05, 250.0, 2e4, 1.5e6)] == [
        "0.05",
        "250",
        "20k",
        "1.5M",
    ]


def test_thinning_keeps_every_spike_gap_and_end():
    rng = np.random.default_rng(0)
    y = rng.normal(size=100_003)
    spikes, gaps = [7, 40_000, 100_001], [999, 70_000]
    y[spikes], y[gaps] = 50, np.nan
    x, thinned = thin(Curve(np.arange(len(y), dtype=float), y), 500)
    assert len(x) < 3000
    assert set(spikes) <= set(x)
    assert set(gaps) == set(x[np.isnan(thinned)])
    assert (x[0], x[-1]) == (0, len(y) - 1)
    np.testing.assert_array_equal(thinned, y[x.astype(int)])


def test_a_trend_is_not_moved_by_spikes_and_stops_where_most_is_missing():
    y = np.ones(10_000)
    y[::100] = 1e30
    y[5000:5100] = np.nan
    y[8000] = np.nan
    x, middle = trend(Curve(np.arange(len(y), dtype=float), y), 200)
    assert set(middle[~np.isnan(middle)]) == {1.0}
    assert list(x[np.isnan(middle)]) == [5024.5, 5074.5]
    assert trend(Curve(x, middle), 200) is None


def test_values_between_gaps_are_seen_to_be_alone():
    nan = math.nan
    assert list(np.flatnonzero(alone(np.array([1, nan, 2, nan, nan, 3, 4, nan, 5])))) == [0, 2, 8]
    assert list(alone(np.array([1.0]))) == [True]


def test_a_panel_shows_training_held_out_and_events(run, figure):
    drawn = figure([str(run)], ["nats_per_token", "loss"], "step")
    nats, loss = drawn.axes
    assert nats.get_title(loc="left") == "nats_per_token"
    styles = [
        (line.get_linestyle(), line.get_marker(), len(line.get_xdata())) for line in nats.lines
    ]
    assert ("-", "None", 50) in styles
    assert ("--", "o", 5) in styles
    marks = {line.get_marker(): list(line.get_xdata()) for line in loss.lines}
    assert (marks["^"], marks["x"]) == ([210], [300])
    assert list(np.flatnonzero(np.isnan(loss.lines[0].get_ydata()))) == [28, 29]
    (legend,) = drawn.legends
    assert [text.get_text() for text in legend.get_texts()] == ["held-out", "spike", "skipped step"]


def test_runs_differ_by_colour_and_are_named_as_short_as_tells_them_apart(
    run, write, lines, figure
):
    other = write("sweep/_a$1$", lines())
    drawn = figure([str(run), str(other), str(run)], ["mmd"], "step")
    names = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert names[:2] == ["run", "sweep/_a$1$"]
    assert len({line.get_color() for line in drawn.axes[0].lines}) == 2


@pytest.mark.parametrize("panels", range(1, 9))
def test_every_number_of_panels_has_room(write, figure, panels):
    keys = [f"key_{n}" for n in range(panels)]
    runs = [
        write(f"run-{n}", [{"step": s, **dict.fromkeys(keys, s)} for s in (1, 2)]) for n in (1, 2)
    ]
    drawn = figure(list(map(str, runs)), keys, "step")
    visible = [axes for axes in drawn.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in visible] == keys
    boxes = [axes.get_tightbbox() for axes in visible]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in boxes[:n])
    assert all(axes.get_window_extent().width > 250 for axes in visible)


@pytest.mark.parametrize("suffix", ["png", "svg", "PDF"])
def test_a_picture_is_written_in_the_format_of_its_name(run, tmp_path, t5vae, suffix):
    out = tmp_path / f"curves.{suffix}"
    code, told, err = t5vae("plot", run, "--out", out)
    assert (code, told, err) == (0, f"curves: {out}\n", "")
    start = {"png": b"\x89PNG", "svg": b"<?xml", "PDF": b"%PDF"}[suffix]
    assert out.read_bytes().startswith(start)
    if suffix == "png":
        pixels = imread(out)[..., :3]
        blue = mpl.colors.to_rgb(mpl.color_sequences["tab10"][0])
        assert (np.abs(pixels - blue).max(axis=2) < 0.02).sum() > 1000


@pytest.mark.parametrize("values", [[1.5], [None] * 5, [0.0, 0.0], [1e30, 1.0], [None, 1.0, None]])
def test_little_to_draw_is_drawn(write, tmp_path, values):
    run = write("run", [{"step": n, "loss": value} for n, value in enumerate(values)])
    drawing = plan([str(run)], None, "step")
    write_picture(drawing, tmp_path / "curves.png")
    text = draw(drawing, 80, colored=False)
    assert ("no finite value" in text) == (set(values) == {None})


def test_a_terminal_shows_the_same(run, write, lines, t5vae, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    code, out, err = t5vae("plot", run, "--key", "nats_per_token")
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    title, *_, legend = out.splitlines()
    assert title.strip() == "nats_per_token"
    assert legend == "run   o held-out   ^ spike   x skipped step"
    assert max(map(len, out.splitlines())) <= 90
    assert all(mark in out for mark in "o^x\u28c0")
    drawing = plan([str(run), str(write("other", lines()))], ["loss"], "step")
    assert draw(drawing, 90, colored=False).endswith("A run   B other   ^ spike   x skipped step")
    assert "\x1b[38;5;208m" in draw(drawing, 90, colored=True)
    wide = plan([str(run)], ["loss", "mmd"], "step")
    assert draw(wide, 180, colored=False).splitlines()[0].split() == ["loss", "mmd"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--key", "nats_per_tokn"], "did you mean nats_per_token, eval/nats_per_token"),
        (["--key", "train/loss"], "did you mean loss?"),
        (["--key", "zzz"], "there are checkpoint, consumed, eval/nats_per_token"),
        (["--out", "nowhere/curves.png"], "there is no folder nowhere"),
        (["--out", "curves.jpg"], "curves.jpg must end in .png, .svg or .pdf"),
        (["--out", "curves"], "must end in"),
        (["--out", "folder.png"], "cannot write folder.png: Is a directory"),
    ],
)
def test_options_that_cannot_be_met_are_refused_in_one_line(
    run, tmp_path, t5vae, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    code, out, err = t5vae("plot", run, *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: the run has not logged a step yet"),
        (b'{"step": 1, "lo', "is empty"),
        (b"\xf2\x00\n", "is damaged"),
        (b'{"step": 1}\n{"step": 2\n{"step": 3}\n', "is damaged"),
        (b'{"loss": 1}\n', "has lines without step"),
        (None, "Is a directory"),
        ("none", "is no run: it has no metrics.jsonl"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(tmp_path, write, t5vae, content, said):
    if content is None:
        (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    elif content != "none":
        write("run", content)
    code, out, err = t5vae("plot", tmp_path / "run")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err
    assert str(tmp_path / "run") in err


def test_nothing_heavy_is_loaded(run):
    code = (
        "import sys\nfrom t5vae import cli\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print({'torch', 'transformers', 'deepspeed'} & set(sys.modules))\n"
    )
    for command in (["runs", run], ["plot", run]):
        done = subprocess.run(
            [sys.executable, "-c", code, *command], capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "set()", done.stderr
