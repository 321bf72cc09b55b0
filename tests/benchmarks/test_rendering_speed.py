"""Scenes with their captions drawn per second on one core: training must not wait for them."""

import random
import time

import pytest

from textloc_utils.miniatures import world

SCENES, LEAST = 3000, 2000


@pytest.mark.benchmark
def test_scenes_per_second():
    rng = random.Random(0)
    for material in world.MATERIALS:
        world.render(world.Scene(text="ABC", material=material))  # patterns and letters are made once
    start = time.process_time()
    for _ in range(SCENES):
        scene = world.random_scene(rng)
        world.render(scene)
        world.caption(scene, rng)
    speed = SCENES / (time.process_time() - start)
    print(f"{speed:.0f} scenes a second")
    assert speed >= LEAST
