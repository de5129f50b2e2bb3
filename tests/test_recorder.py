"""The two recorders that keep nothing."""

from s2ap_deploy.recorder import NoSnapshots, Recorder, Silent, Snapshots


def test_silence_takes_everything_and_says_nothing(capfd) -> None:
    recorder: Recorder = Silent()
    recorder.begin("search", 3, "step")
    recorder.advance()
    recorder.log("search", {"loss": 1.0})
    recorder.note("a choice")
    recorder.warn("a doubt")
    recorder.end()
    assert capfd.readouterr() == ("", "")  # type: ignore[attr-defined]


def test_no_snapshots_always_start_afresh() -> None:
    snapshots: Snapshots = NoSnapshots()
    snapshots.save_snapshot({}, {"epoch": 1})
    assert snapshots.load_snapshot() is None
