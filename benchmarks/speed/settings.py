"""How much is measured: the full plan of a GPU, and the quick one that a CPU gets through."""

from __future__ import annotations

from dataclasses import asdict, dataclass

FAMILIES = ("sdxl", "sd15")
PIXELS = {"sdxl": 1024, "sd15": 512}
QUICK_PIXELS = 64
BATCH = 2  # one picture with classifier-free guidance
ALL = "all"


@dataclass(frozen=True)
class Plan:
    """warm_up, then rounds x repeats calls; seconds: what one candidate of a layer may take at
    most; limit: seconds an arm may take to load, compile and make its first calls."""

    warm_up: int
    rounds: int
    repeats: int
    seconds: float
    limit: float


FULL = Plan(warm_up=20, rounds=5, repeats=50, seconds=5.0, limit=1200.0)
QUICK = Plan(warm_up=1, rounds=3, repeats=2, seconds=0.2, limit=300.0)
# on a GPU quick means small models, not few calls: those cost nothing there
QUICK_GPU = Plan(warm_up=5, rounds=5, repeats=10, seconds=1.0, limit=300.0)


@dataclass(frozen=True)
class Setting:
    """One UNet under test: family and size of `devtools.synthetic`, pixels, batch, and plan."""

    family: str
    size: str
    pixels: int
    batch: int
    plan: Plan

    def as_dict(self) -> dict:
        """JSON-able."""
        return asdict(self)

    @classmethod
    def of_dict(cls, facts: dict) -> Setting:
        """What `as_dict` gave -> the setting."""
        return cls(**{**facts, "plan": Plan(**facts["plan"])})


def setting(family: str, quick: bool, gpu: bool) -> Setting:
    """The setting of a family."""
    if quick:
        return Setting(family, "tiny", QUICK_PIXELS, BATCH, QUICK_GPU if gpu else QUICK)
    return Setting(family, "full", PIXELS[family], BATCH, FULL)
