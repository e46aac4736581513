"""Five files, one after the other; those that are there are not made again."""

import time

from stages.files import write_text
from toy_pipeline import mischief


def run(context):
    if context.place.rank:  # it has nothing to do, and may die all the same
        return mischief(f"rank{context.place.rank}", 0)
    drawn = (context.inputs["draw"] / "drawn.txt").read_text()
    paths = [context.output / "tiles" / f"{number}.txt" for number in range(5)]
    done = [path for path in paths if path.exists()]
    context.progress.start(len(paths), "tiles", done=len(done))
    if done:
        context.progress.resumed(f"{len(done)} of {len(paths)} tiles were done")
    for number, path in enumerate(paths):
        if path not in done:
            context.progress.mark(f"toy.tile{number}")
            mischief("tiles", number)
            time.sleep(0.02)  # the memory is sampled as often
            write_text(path, f"{drawn} {number} {context.config.denoise.strength}")
            write_text(context.output / "checkpoint.txt", str(number))
            context.progress.advance()
