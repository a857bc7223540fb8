"""What a run leaves to others: facts of its data, files beside the adapter, a push to the Hub."""

import logging
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from stemtune.config import Output
from stemtune.data.memories import MEMORIES_FILE, Memory, memory_lines
from stemtune.data.prepare import Prepared
from stemtune.data.renderer import Renderer
from stemtune.errors import StemtuneError
from stemtune.export.card import Known, adapter_card
from stemtune.export.curves import pictures
from stemtune.export.hub import push, push_command
from stemtune.generate import generation_config
from stemtune.model.names import CARD
from stemtune.network import first_line
from stemtune.tree.logprobs import base_model

log = logging.getLogger(__name__)


def data_facts(data: Prepared) -> dict[str, Any]:
    """For `run.json`: what the data was, and what became of its rows."""
    ledger = data.ledger
    return {
        "fingerprint": data.fingerprint,
        "data": data.train.survey.sources(),
        "ledger": {
            "rows": ledger.rows,
            "train_records": len(data.train),
            "eval_records": len(data.eval),
            "num_refused": ledger.num_refused,
            "refused": [vars(refusal) for refusal in ledger.refused],
            "formats": ledger.formats,
            "notes": ledger.notes,
        },
    }


def adapter_files(
    known: Known,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    memories: Seq[Memory],
) -> dict[str, str | bytes]:
    """What stands beside PEFT's files, by name: the card and its pictures, the settings of
    generation, and what a character remembers."""
    renderer = Renderer(tokenizer, known.config.data.template)
    files: dict[str, str | bytes] = {
        CARD: adapter_card(known),
        **pictures(known.lines),
        "generation_config.json": generation_config(base_model(model), renderer),
    }
    if memories:
        files[MEMORIES_FILE] = memory_lines(memories)
    return files


def push_finished(folder: Path, output: Output) -> None:
    """As `output.push_to_hub` says. The run is done: a push that fails, or is interrupted, is no
    failure of the run.

    Args:
        folder: the run's.
    """
    if output.push_to_hub is None:
        return
    private = output.hub_private_repo
    try:
        log.info("pushed: %s", push(folder / "adapter", output.push_to_hub, private=private))
    except (Exception, KeyboardInterrupt) as error:
        again = push_command(folder, output.push_to_hub, private=private)
        hint = f" ({error.hint})" if isinstance(error, StemtuneError) and error.hint else ""
        log.warning("the run is done, but not pushed: %s%s", first_line(error), hint)
        log.warning("to push it: %s", again)
