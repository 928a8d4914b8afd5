"""The demonstration: its registry, its report, its parts, a tiny run of every chapter, and the command around it."""

from __future__ import annotations

import importlib.util
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call

import fastseq.nn
from fastseq import cli, demo
from fastseq.demo import report
from fastseq.demo.character_model import Batches, CharacterModel, chunks, corpus
from fastseq.demo.race import Runner, forward, race, time_in_turns
from fastseq.demo.report import Chapter, Picture, Sample, Section, Table, Text
from fastseq.demo.step_loop import StepLoop
from tests.tolerance import assert_within_budget

NASTY = "<script>alert('x')</script> & \"quoted\" <b>"
VOID = {"meta", "br", "link", "img", "input", "hr"}


@pytest.fixture(scope="module")
def text():
    return corpus()


class Page(HTMLParser):
    """Collects what a browser would see, and fails on tags that do not match."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("href", "xlink:href", "src"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def check_page(source: str) -> Page:
    """What holds of every report: matching tags, unique ids, links that stay inside the page."""
    assert source.startswith("<!DOCTYPE html>")
    page = Page(source)
    assert len(page.ids) == len(set(page.ids))
    assert {"script", "link", "iframe"}.isdisjoint(page.tags)
    for link in page.links:
        assert link.startswith("data:") or link.removeprefix("#") in page.ids, link
    for target in re.findall(r"url\(#([^)]*)\)", source):
        assert target in page.ids
    return page


# --- registry


def test_every_file_in_chapters_is_a_chapter():
    files = Path(demo.__file__).with_name("chapters").glob("[!_]*.py")
    assert demo.names() == sorted(file.stem for file in files)
    assert "lstm" in demo.names()
    for name in demo.names():
        module = demo.load(name)
        assert isinstance(module.TITLE, str)
        assert 150 < len(module.ABOUT) < 500
        assert callable(module.run)
    modules = [demo.load(name) for name in demo.names()]
    assert sum(module.FULL_SECONDS for module in modules) <= 320  # `make demo` stays below six minutes
    assert sum(module.QUICK_SECONDS for module in modules) <= 50


def test_unknown_chapter():
    with pytest.raises(ValueError, match=r"demo: NAME must be one of .*lstm.*, got 'no_such'"):
        demo.load("no_such")


def test_chapters_share_the_time(monkeypatch):
    seen: dict[str, demo.Budget] = {}

    def chapter(name):
        def run(budget):
            seen[name] = budget
            return [Section(name, [Text("done")])]

        seconds = {"FULL_SECONDS": {"one": 20, "two": 10}[name], "QUICK_SECONDS": 5}
        return SimpleNamespace(TITLE=name.upper(), ABOUT=f"{name}.", run=run, **seconds)

    monkeypatch.setattr(demo, "load", chapter)
    chapters = demo.run(["one", "two"], quick=False, seed=3)
    assert [(c.title, c.about) for c in chapters] == [("ONE", "one."), ("TWO", "two.")]
    assert 19 < seen["one"].seconds <= 20
    assert 29 < seen["two"].seconds <= 30  # the first took no time, so what it left goes to the second
    assert seen["two"].seed == 3
    assert 0 < seen["two"].remaining() <= 30
    demo.run(["one", "two"], quick=True)
    assert 4 < seen["one"].seconds <= 5
    demo.run(["two"], quick=False)
    assert 9 < seen["two"].seconds <= 10


# --- report


def test_report_escapes_all_text():
    blocks = [Text(NASTY), Table((NASTY, "n"), ((NASTY, "1"),), NASTY), Sample(NASTY, NASTY)]
    blocks.append(Picture("<svg></svg>", NASTY, NASTY))
    chapter = Chapter(NASTY, [Section(NASTY, blocks), Section(NASTY, [])], NASTY)
    source = report.html(NASTY, [(NASTY, NASTY)], [chapter], [NASTY])
    page = check_page(source)
    assert "<script" not in source.lower()
    assert "<b>" not in source
    assert page.words.count(NASTY) >= 14


def test_table_sets_numbers_right_and_refuses_ragged_rows():
    table = Table(("name", "n", "word"), (("a", "1.5", "x"), ("b", "-2", "3 of")))
    assert table.numeric() == [False, True, False]
    assert '<td class="number">1.5</td><td>x</td>' in report.html("t", [], [Chapter("c", [Section("s", [table])])])
    with pytest.raises(ValueError, match="Table: every row must have 2 cells as the head, got 1"):
        Table(("a", "b"), (("1",),))


def test_pictures_share_a_page_and_take_its_colours():
    pictures = pytest.importorskip("fastseq.demo.pictures", reason="matplotlib is not installed")
    line = ("#d9822b", [0.0, 1.0], [2.0, 1.0])
    grey = torch.linspace(0, 1, 4).expand(2, 4).numpy()
    svgs = [
        pictures.curves([("x <&> $a$", "y", {"a & b": line})]),
        pictures.bars("ms", {"a": ("#d9822b", 1.25), "b": ("#3a8fd9", 3.0)}),
        pictures.histograms([("one", {"a": ("#d9822b", [0.5, 0.5])}), ("two", {"a": ("#d9822b", [1.0, 0.0])})]),
        pictures.heat_map(["<", "$", "$", "é"], [("row", grey)]),
    ]
    blocks = [Picture(svg, "a picture") for svg in svgs]
    source = report.html("t", [], [Chapter("c", [Section("s", blocks)])])
    page = check_page(source)
    assert page.tags.count("svg") == 4
    assert "currentColor" in source
    assert "#010203" not in source
    assert {"x <&> $a$", "a & b", "1.2", "é"} <= {word.strip() for word in page.words}


# --- text and training


def test_no_paragraph_is_both_learnt_and_held_out(text):
    def paragraphs(topics):
        return {p.strip() for topic in topics for p in text.decode(topic).split("\n\n") if p.strip()}

    assert paragraphs(text.training).isdisjoint(paragraphs(text.held_out))
    held = sum(map(len, text.held_out))
    assert 0.05 < held / (held + sum(map(len, text.training))) < 0.15
    assert text.decode(text.encode("The text.\n")) == "The text.\n"


def test_chunks_go_on_where_the_last_ended():
    topics = [torch.arange(100, 123), torch.arange(200, 214), torch.arange(300, 304)]
    (first, begins), (second, later) = chunks(topics, T=5, B=3)
    assert first.T.tolist() == [list(range(100, 106)), list(range(110, 116)), list(range(200, 206))]
    assert second.T.tolist() == [list(range(105, 111)), list(range(115, 121)), list(range(205, 211))]
    assert (begins.tolist(), later.tolist()) == ([True] * 3, [False] * 3)
    with pytest.raises(ValueError, match="chunks: the topics must give at least B = 9 chunks of T = 5, got 6"):
        chunks(topics, T=5, B=9)


def test_batches_follow_the_seed(text):
    one, same, other = (Batches(text.training, 20, 4, seed) for seed in (1, 1, 2))
    first = next(one)[0]
    assert torch.equal(first, next(same)[0])
    assert not torch.equal(first, next(other)[0])


def test_mask_and_zeroed_state_are_the_same_treatment():
    torch.manual_seed(1)
    model = CharacterModel(fastseq.nn.LSTM(5, 7), 11)
    chunk = torch.randint(11, (6, 3)), torch.tensor([True, False, True])
    state = torch.randn(1, 3, 7), torch.randn(1, 3, 7)

    def zeroed(parameters, text, begins, h, c):
        def call(text, state):
            return functional_call(model, parameters, (text, state))

        return forward(call, (text, begins), (h, c), False)[0]

    got = forward(model, chunk, state, True)[0]
    parameters = dict(model.named_parameters())
    assert_within_budget("logits", got, zeroed, [parameters, *chunk, *state])
    assert not torch.equal(got, model(chunk[0][:-1], state)[0])  # the restart matters


def test_step_loop_is_the_same_function():
    torch.manual_seed(2)
    stock, loop = nn.LSTM(4, 6, 2), StepLoop(4, 6, 2, tau=1.0, noise_probability=0.0)
    loop.load_state_dict(stock.state_dict())
    x, h, c = torch.randn(9, 3, 4), torch.randn(2, 3, 6), torch.randn(2, 3, 6)

    def flat(parameters, *inputs):
        y, (h_n, c_n) = functional_call(stock, parameters, (inputs[0], inputs[1:]))
        return y, h_n, c_n

    for training in (False, True):  # noise of probability 0 and tau 1 leave the gates alone
        y, (h_n, c_n) = loop.train(training)(x, (h, c))
        assert_within_budget("y h_n c_n", [y, h_n, c_n], flat, [dict(stock.named_parameters()), x, h, c])


def test_step_loop_noise_has_the_law_of_the_gates():
    noise = StepLoop(1, 1, noise_probability=0.2)._noise(200, 50, 20)
    i_f, rest = noise.split(40, -1)
    assert not rest.any()
    draws = i_f.numel()
    share = (i_f != 0).double().mean().item()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / draws) ** 0.5
    above = (i_f[i_f != 0] > 1.0).double().mean().item()  # logistic: 1 / (1 + e)
    assert abs(above - 0.26894) < 5 * (0.27 * 0.73 / (0.2 * draws)) ** 0.5


def test_race_learns_and_keeps_the_clocks(text):
    held_out = chunks(text.held_out, 20, 8)[:5]
    runners = []
    for name, lstm in (("stock", nn.LSTM), ("ours", fastseq.nn.LSTM)):
        torch.manual_seed(0)
        model = CharacterModel(lstm(8, 16), len(text.alphabet))
        runners.append(Runner(name, "#000000", model, Batches(text.training, 20, 8, 0), masked=name == "ours"))
    assert torch.equal(runners[0].model.lstm.weight_hh_l0, runners[1].model.lstm.weight_hh_l0)
    told = []
    race(runners, held_out, 0.4, 600.0, lambda done, note: told.append((done, note)), most=2)
    for runner in runners:
        assert len(runner.curve) == 3
        assert runner.curve[-1][2] < runner.curve[0][2]
        assert runner.seconds >= 0.4
        assert runner.curve[-1][1] == len(runner.steps)
    assert [done for done, _ in told] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_race_stops_all_after_the_same_round(text):
    held_out = chunks(text.held_out, 20, 8)[:2]
    model = CharacterModel(nn.LSTM(8, 16), len(text.alphabet))
    runner = Runner("slow", "#000000", model, Batches(text.training, 20, 8, 0), masked=False)
    told = []
    race([runner], held_out, 0.4, 0.0, lambda done, note: told.append(note), most=9)
    assert len(runner.curve) == 2  # the start and the one round that all have had
    assert told[-1] == "out of time"


def test_time_in_turns_calls_all_equally():
    calls: list[str] = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    times = time_in_turns(functions, 0.0, lambda done, note: None)
    assert calls == ["a", "b"] * 2  # once uncounted, once counted
    assert [len(v) for v in times.values()] == [1, 1]


def test_lstm_chapter(tmp_path):
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    from fastseq.demo import facts
    from fastseq.demo.chapters import lstm

    stages = []
    budget = demo.Budget(1.0, 5, lambda stage, done, note: stages.append((stage, done)))
    sections = lstm.run(budget, lstm.Sizes(T=20, B=8, E=8, H=16, L=2, held_out=4))
    ended = {stage for stage, done in stages if done == 1}
    assert ended == {"training", "timing", "compressing", "saving", "looking at gates"}
    out = tmp_path / "r.html"
    report.write(out, "fastseq demo", facts.collect(5), [Chapter(lstm.TITLE, sections)])
    page = check_page(out.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 5
    words = " ".join(page.words)
    for part in (
        "bits per character",
        "LSTM alone, ms",
        "reset=mask",
        "fastseq backend",
        "microseconds per character",
        "i, f of rank H/8",
    ):
        assert part in words
    tables = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    assert not re.search(r"\bnan\b|\binf\b", str([table.rows for table in tables]))


@pytest.mark.parametrize("mine, theirs, said", [(10, 20, "faster"), (20, 10, "slower"), (10, 10, "is as fast")])
def test_the_verdict_follows_the_numbers(mine, theirs, said):
    pytest.importorskip("matplotlib", reason="the demo extra is not installed")
    from fastseq.demo.chapters.lstm import _compare

    def runner(label, milliseconds, bits):
        curve = [(0.0, 0, 6.0), (5.0, 9, bits)]
        return SimpleNamespace(label=label, milliseconds=milliseconds, curve=curve)

    better = _compare(runner("A", mine, 2.0), runner("B", theirs, 2.25))
    worse = _compare(runner("A", mine, 2.25), runner("B", theirs, 2.0))
    assert said in better
    assert said in worse
    assert "0.250 better. It reached the final value of B after 5 of 5 seconds." in better
    assert "0.250 worse. It did not reach the final value of B within its time." in worse
    assert "the same. It reached" in _compare(runner("A", mine, 2.0), runner("B", theirs, 2.0))


# --- the command


@pytest.fixture
def one_chapter(monkeypatch):
    def run(budget):
        return [Section("part", [Text(f"seed {budget.seed}")])]

    module = SimpleNamespace(TITLE="A title", ABOUT="About it.", run=run, FULL_SECONDS=2.0, QUICK_SECONDS=1.0)
    monkeypatch.setattr(demo, "load", lambda name: module)


def test_demo_command_prints_and_writes(one_chapter, tmp_path, capsys):
    pytest.importorskip("rich", reason="the demo extra is not installed")
    out = tmp_path / "out.html"
    assert cli.main(["demo", "lstm", "--quick", "--out", str(out), "--seed", "7"]) == 0
    printed = capsys.readouterr().out
    assert "seed 7" in printed
    assert str(out) in printed
    assert "seed 7" in " ".join(check_page(out.read_text(encoding="utf-8")).words)


@pytest.mark.parametrize(
    "missing, said",
    [
        ({"rich"}, "fastseq demo: needs rich: pip install fastseq-kernels[demo]\n"),
        ({"sklearn", "PIL"}, "fastseq demo: needs pillow and scikit-learn: pip install fastseq-kernels[demo]\n"),
        ({"rich", "matplotlib"}, "fastseq demo: needs matplotlib and rich: pip install fastseq-kernels[demo]\n"),
        ({"torch"}, "fastseq demo: needs torch: pip install fastseq-kernels[demo,torch]\n"),
    ],
)
def test_demo_command_names_what_is_missing(missing, said, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name in missing else find(name))
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == said


def test_demo_command_refuses_a_path_before_the_work(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: object())
    monkeypatch.setattr(demo, "run", lambda *args: pytest.fail("the demo ran"))
    for out in (tmp_path, tmp_path / "no" / "r.html"):
        assert cli.main(["demo", "--out", str(out)]) == 1
        assert f"--out must name a file in an existing folder, got {out}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "the following arguments are required: COMMAND"),
        (["demo", "no_such"], "invalid choice: 'no_such'"),
        (["demo", "--seed", "-1"], "must be in 0..2**63-1, got -1"),
        (["demo", "--seed", "x"], "invalid"),
    ],
)
def test_wrong_usage(arguments, said, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_interrupt_is_one_line(monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "find_spec", lambda name: object())
    monkeypatch.setattr(demo, "run", interrupted)
    assert cli.main(["demo"]) == 130
    assert capsys.readouterr().err == "fastseq demo: interrupted, nothing was written\n"


def test_info_command_shows_the_configuration(capsys):
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    fastseq.show_config()
    assert shown == capsys.readouterr().out
    assert fastseq.__version__ in shown


def test_progress_without_a_terminal_is_a_few_lines():
    pytest.importorskip("rich", reason="the demo extra is not installed")
    from rich.console import Console

    from fastseq.demo import terminal

    output = io.StringIO()
    with terminal.progress(Console(file=output)) as progress:
        for k in range(101):
            progress("training", k / 100, "[b]bits[/b]")
        progress("timing", 0.0, "")
    assert output.getvalue().splitlines() == ["training: 0% [b]bits[/b]", "training: 100% [b]bits[/b]", "timing: 0%"]


def test_progress_on_a_terminal_is_a_bar():
    pytest.importorskip("rich", reason="the demo extra is not installed")
    from rich.console import Console

    from fastseq.demo import terminal

    output = io.StringIO()
    with terminal.progress(Console(file=output, force_terminal=True, width=100)) as progress:
        progress("training", 0.5, "[b]bits[/b]")
        progress("training", 1.0, "[b]bits[/b]")
    assert "100%" in output.getvalue()
    assert "[b]bits[/b]" in output.getvalue()


def test_terminal_shows_text_as_it_is():
    pytest.importorskip("rich", reason="the demo extra is not installed")
    from rich.console import Console

    from fastseq.demo import terminal

    output = io.StringIO()
    blocks = [Text("a [b]c[/b]"), Table(("[i]n", "v"), (("[/x]", "1"),), "cap [x]"), Sample("s\n [y]", "said")]
    blocks.append(Picture("<svg/>", "seen"))
    terminal.show(Console(file=output, width=80), [("[k]", "[v]")], [Chapter("[t]", [Section("[s]", blocks)])])
    shown = output.getvalue()
    for part in ("a [b]c[/b]", "[i]n", "[/x]", "cap [x]", " [y]", "said", "seen", "[k]: [v]", "[t]", "[s]"):
        assert part in shown
    assert "<svg" not in shown
