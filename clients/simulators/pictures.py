"""Films and plots of episodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from steersman.clients.simulators.episode import Episode
from steersman.clients.simulators.simulator import Picture
from steersman.clients.simulators.study import STEERED, UNSTEERED, Episodes

FPS = 20
COLOURS = {UNSTEERED: "#555555", STEERED: "#d1495b"}


def film(episodes: Episodes, out: Path) -> None:
    """Writes what was filmed, one seed after the other, conditions side by side.

    Raises ValueError for a name that ends in neither .gif nor .mp4 and ImportError where MP4s cannot be written.
    """
    frames = [frame for pair in zip(*episodes.values(), strict=True) for frame in _beside(pair)]
    if not frames:
        raise ValueError("no episode was filmed")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".gif":
        first, *rest = (Image.fromarray(frame) for frame in frames)
        first.save(out, save_all=True, append_images=rest, duration=1000 // FPS, loop=0)
    elif out.suffix == ".mp4":
        try:
            import imageio
            import imageio_ffmpeg  # noqa: F401  (imageio finds it by itself, and says less where it is missing)
        except ImportError as error:
            raise ImportError(f"MP4 needs imageio-ffmpeg ({error}): pip install 'steersman[robots]'") from None
        imageio.mimwrite(out, list[Any](frames), fps=FPS, macro_block_size=1)
    else:
        raise ValueError(f"{out}: a film's name must end in .gif or .mp4")


def _beside(pair: Sequence[Episode]) -> list[Picture]:
    return [np.concatenate(frames, axis=1) for frames in zip(*(e.frames for e in pair), strict=True)]


def plot(episodes: Episodes, title: str, out: Path) -> None:
    """Writes the tool's height over time and how far from the goal each episode ended, in the format of the name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    heights, ends = figure.subplots(1, 2, width_ratios=(2, 1))
    for name, each in episodes.items():
        paths = np.stack([e.positions[:, 2] for e in each])  # [episodes, steps + 1]
        time = np.linspace(0, each[0].seconds, paths.shape[1])
        heights.plot(time, 100 * paths.T, color=COLOURS[name], alpha=0.2, linewidth=0.7)
        label = f"{name}: {sum(e.success for e in each)} of {len(each)} succeed"
        heights.plot(time, 100 * paths.mean(axis=0), color=COLOURS[name], linewidth=2, label=label)
        at = [list(episodes).index(name)] * len(each)
        ends.plot(at, [100 * e.distance for e in each], "o", color=COLOURS[name], alpha=0.5)
    heights.set(xlabel="time (s)", ylabel="height of the tool (cm)", title=title)
    heights.legend()
    ends.set(ylabel="distance from the goal at the end (cm)", xlim=(-0.5, len(episodes) - 0.5), ylim=(0, None))
    ends.set_xticks(range(len(episodes)), list(episodes))
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=120)
