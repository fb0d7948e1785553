"""What the baseline without synthesis costs: python benchmarks/squant_speed.py [TIMM_NAME]

Recipe `squant` on a randomly initialised network (resnet18): seconds of each stage, three times; nothing is downloaded.
The network is captured as a graph once, before: every method needs that.
"""

from __future__ import annotations

import sys
import time

from mirageq import Teacher, models, quantize, recipe


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "resnet18"
    teacher = Teacher.wrap(models.import_timm().create_model(name).eval(), (3, 224, 224))
    wanted = recipe.build(recipe.set_bits(recipe.read("squant"), "w4a4"))
    for _ in range(3):
        started = time.perf_counter()
        result = quantize(teacher, **vars(wanted))
        stages = ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in result.seconds.items())
        print(f"{name}: {time.perf_counter() - started:.2f} s ({stages})")


if __name__ == "__main__":
    main()
