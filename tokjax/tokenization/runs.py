"""A trained run of a model of characters, ready to decode."""

from pathlib import Path
from typing import Any

from tokjax.data.tokenizers import Tokenizer
from tokjax.data.word_tokenizer import WordTokenizer
from tokjax.errors import ConfigError
from tokjax.tokenization.hat import Hat, hat
from tokjax.tokenization.toucan import Toucan, toucan
from tokjax.training.trained import load_trained, read_trained


def of_run(workdir: Path) -> tuple[Any, Any, Tokenizer]:
    """Returns predictor and parameters of a run, as `decode` takes them, and its tokenizer.

    Args:
        workdir: of a run whose last objective is "hat" or "toucan".

    Raises:
        ConfigError: it is another one, or a control that does not decode.
        CheckpointError: the workdir holds no run.
    """
    objective = read_trained(workdir).config.stage_list[-1].objective
    if not isinstance(objective, Hat | Toucan):
        raise ConfigError(
            f"{workdir} was trained on {type(objective).__name__}, neither on 'hat' nor on "
            f"'toucan': load it by tokjax.load"
        )
    run = load_trained(workdir)
    if isinstance(objective, Toucan):
        return *toucan(run.model, run.params, run.heads, objective), run.tokenizer
    assert isinstance(run.tokenizer, WordTokenizer)
    longest = run.tokenizer.longest
    return *hat(run.model, run.params, run.heads, objective, longest=longest), run.tokenizer
