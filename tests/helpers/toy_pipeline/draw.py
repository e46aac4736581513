"""One file from seed and prompt."""

from stages.files import write_text
from toy_pipeline import mischief


def run(context):
    context.progress.start(1, "steps")
    context.progress.mark("toy.draw")
    mischief("draw", 0)
    write_text(context.output / "drawn.txt", f"{context.config.seed} {context.config.prompt}")
    context.progress.advance()
    return {"steps": 1}
