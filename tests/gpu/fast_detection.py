"""Fast: the detector's training step and what it finds, beside torchvision's `fasterrcnn_resnet50_fpn`, bf16."""

from tests.bench.bench_detection import measuring_ways, parts_of, training_ways
from tests.gpu.measure import in_turn, peak
from tests.gpu.models import imported
from tests.gpu.session import Part, Session


def detection(session: Session) -> None:
    """Steps of VOC's batch for one of eight GPUs, and one picture at a time, at a short side of 800."""
    imported("torchvision")
    device, toy = session.device, session.dry
    count, side = session.size(5, 1), session.size(800, 64)
    precision = session.size("bf16", "fp32")
    calls = {
        "training": (training_ways(device, count, side, precision, toy), count, session.size(8, 1)),
        "measuring": (measuring_ways(device, side, precision, toy), 1, session.size(20, 1)),
    }
    for what, (ways, pictures, rounds) in calls.items():
        for way, call in ways.items():
            with peak(session) as taken:
                call()
            session.note(what=f"detector, {what}, {way}: peak", gb=taken[0])
        times = in_turn(session, ways, rounds=rounds, warm=session.size(2, 1))
        for way, timing in times.items():
            per_s = 1e3 * pictures / timing.whole
            session.note(what=f"detector, {what}, {way}", pictures_per_s=per_s, ms=timing.whole, host_ms=timing.host)
    for part, seconds in parts_of(device, count, side, precision, toy).items():
        session.note(what=f"detector, a training step's {part}", ms=1e3 * seconds)


PARTS = (Part("fast: detection", 60, detection),)
