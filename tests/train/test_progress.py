import io

from rich.console import Console

from mor.train.progress import BarProgress, PlainProgress, SilentProgress, progress_for

TRAINING = {
    "kind": "training",
    "step": 50,
    "loss": 2.3456,
    "tokens_per_second": 12345.6,
    "mfu": 0.3821,
    "mean_depth": 1.87,
}
SCORES = {"causal": {"bits_per_byte": 1.9, "mean_depth": 2.0}, "top_k": {"bits_per_byte": 1.8, "mean_depth": 2.0}}
EVALUATION = {"kind": "evaluation", "step": 50, "decisions": SCORES}


def tell(progress):
    progress.start(steps=100, step=40)
    progress.advance(50)
    progress.record(TRAINING)
    progress.record(EVALUATION)
    progress.note("resuming from [here]")
    progress.close()


def test_the_bar_shows_loss_speed_depth_and_time_left():
    console = Console(file=io.StringIO(), force_terminal=True, width=140, color_system=None)
    tell(BarProgress(console, label="mor"))
    text = console.file.getvalue()
    figures = ("loss 2.346", "12,346 tokens/s", "MFU 38%", "mean depth 1.87")
    for part in ("mor", "50/100", *figures, "left", "resuming from [here]"):
        assert part in text
    assert "causal: 1.900 bits per byte at mean depth 2.00, top_k: 1.800 bits per byte" in text


def test_plain_lines_are_few():
    stream = io.StringIO()
    progress = PlainProgress(stream, seconds=3600)
    tell(progress)
    progress.record(TRAINING | {"step": 100})
    lines = stream.getvalue().splitlines()
    assert [line.split(":")[0] for line in lines] == ["train"] * 3
    assert "step 100/100  loss 2.346" in lines[-1]


def test_plain_lines_come_when_their_time_has_come():
    stream = io.StringIO()
    tell(PlainProgress(stream, seconds=0))
    assert "step 50/100  loss 2.346  12,346 tokens/s  MFU 38%  mean depth 1.87" in stream.getvalue()


def test_silence(capsys):
    tell(SilentProgress())
    assert capsys.readouterr() == ("", "")


def test_the_stream_decides():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert isinstance(progress_for(io.StringIO()), PlainProgress)
    assert isinstance(progress_for(Terminal()), BarProgress)
