"""Fast: the loss and its gradient against open_clip's, fp32."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from pyramidclip_hf.levels_pyramidclip import LEVELS
from pyramidclip_hf.loss_pyramidclip import pyramid_loss
from tests.gpu.measure import exact, in_turn, peak
from tests.gpu.models import CLIP, PYRAMID, imported
from tests.gpu.session import Part, Session

WIDTH = 512


def loss(session: Session) -> None:
    """One term, six terms and open_clip's, at growing batches, with peak memory."""
    open_clip = imported("open_clip")
    for pairs in session.size((8192, 16384, 32768, 65536), (32,)):
        embeds = {
            level: F.normalize(torch.randn(pairs, WIDTH, device=session.device), dim=-1).requires_grad_()
            for level in LEVELS
        }
        scale, other = torch.tensor(14.3, device=session.device), open_clip.loss.ClipLoss()
        picture, caption = embeds["global"], embeds["caption"]
        two = {"global": picture, "caption": caption}
        ways: dict[str, Callable[[], object]] = {
            "one term": lambda two=two, scale=scale: pyramid_loss(two, scale, CLIP, 0.0).loss.backward(),
            "six terms": lambda embeds=embeds, scale=scale: pyramid_loss(embeds, scale, PYRAMID, 0.2).loss.backward(),
        }
        # Its two matrices of logits and their gradients are 16 bytes an entry.
        if session.dry or 20 * pairs**2 < torch.cuda.mem_get_info()[0]:
            ways["open_clip"] = lambda p=picture, c=caption, o=other, s=scale: o(p, c, s).backward()
        gigabytes = {}
        with exact():
            for way, call in list(ways.items()):
                with peak(session) as taken:
                    if session.attempt(f"{way}, {pairs}", lambda call=call: call() or True) is None:
                        del ways[way]
                gigabytes[way] = taken[0]
            times = in_turn(session, ways, rounds=session.size(3, 1), warm=1)
        for way, timing in times.items():
            session.note(what=f"{way}, {pairs} pairs", ms=timing.whole, host_ms=timing.host, peak_gb=gigabytes[way])
        _goals(session, pairs, {way: timing.whole for way, timing in times.items()}, gigabytes)


def _goals(session: Session, pairs: int, ms: dict[str, float], gigabytes: dict[str, float]) -> None:
    if {"one term", "open_clip"} <= ms.keys() and pairs in (8192, 32768):
        session.goal(f"{pairs}: time of one term over open_clip's", ms["one term"] / ms["open_clip"], at_most=1.0)
        share = gigabytes["one term"] / gigabytes["open_clip"]
        session.goal(f"{pairs}: memory of one term over open_clip's", share, at_most=0.1)
    if {"one term", "six terms"} <= ms.keys():
        session.goal(f"{pairs}: six terms over one", ms["six terms"] / ms["one term"], at_most=4.5)


PARTS = (Part("fast: loss", 40, loss),)
