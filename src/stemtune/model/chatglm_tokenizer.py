"""The tokenizer of ChatGLM2 and ChatGLM3 as a fast one, with their prompts as chat templates.

The ids are the original's: `[gMASK] sop` and then what SentencePiece makes of the text. Pieces that
are encoded apart each begin with the dummy prefix `▁`, so the templates write a space where one
begins: no piece spans the blank before a word, and one text gives the same ids.
"""

import logging
from collections.abc import Sequence as Seq
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from stemtune.errors import ModelError
from stemtune.model.converted import reason_of

log = logging.getLogger(__name__)
# In the order of their ids, behind the pieces. The original's names for <sop> and <eop> are `sop`
# and `eop`; but what is a token's name here is taken out of any text, and a sophist holds one.
SPECIAL = ["[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"]
ROLES = ["<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
STOPS = ["<|user|>", "<|observation|>"]  # ChatGLM3 ends an answer by whose turn is next
START = "[gMASK]<sop>"

# An answer that ends a dialogue was encoded apart; one of the history is a part of the prompt.
TEMPLATE_2 = (
    START + "{% if tools %}{{ raise_exception('ChatGLM2 knows no tools') }}{% endif %}"
    "{% set ns = namespace(round=0) %}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'user' %}{% set ns.round = ns.round + 1 %}"
    "{{ '[Round ' + ns.round|string + ']\n\n问：' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '答：' }}"
    "{% if not loop.last or add_generation_prompt %}{{ message['content'] + '\n\n' }}"
    "{% elif message['content'] %}{{ ' ' + message['content'] }}{% endif %}"
    "{% else %}{{ raise_exception('ChatGLM2 has no role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '答：' }}{% endif %}"
)
# Tools are listed behind the system prompt. Calls are written as code, in a way of each tool's own.
TEMPLATE_3 = (
    START + "{% if tools and messages[0]['role'] != 'system' %}"
    "{{ raise_exception('ChatGLM3 lists tools behind a system prompt') }}{% endif %}"
    "{% for message in messages %}{% if message['tool_calls'] %}"
    "{{ raise_exception('calls of tools have no form in ChatGLM3') }}{% endif %}"
    "{% if message['role'] == 'tool' %}{% set role = 'observation' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{% if role not in ['system', 'user', 'assistant', 'observation'] %}"
    "{{ raise_exception('ChatGLM3 has no role ' + role) }}{% endif %}"
    "{% set listed = '\n' + tools|tojson(indent=4) if tools and loop.first else '' %}"
    "{% set content = message['content'] + listed %}"
    "{{ '<|' + role + '|>\n' }}{% if content %}{{ ' ' + content }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEMPLATES = {2: TEMPLATE_2, 3: TEMPLATE_3}

TOLERATED = 0.01  # of the pieces
# What tokenizers do differently, beside every piece by itself: blanks, bytes, forms of letters.
PROBES = [
    "",
    " ",
    "  two  blanks   three ",
    "\n",
    "a\n\nb\n c\td",
    "①ﬁＡ e\u0301 \u00a0 \u3000 ▁ \u200b",
    "🜁 𠮷 \x00 \x7f",
    "<s> </s> <unk> <0x41> [gMASK] sop <|user|>",
    "----====    aaaaaaaaaaaaaaa 哈哈哈哈哈哈哈",
]


def build_tokenizer(file: Path, version: int) -> PreTrainedTokenizerFast:
    """The fast tokenizer.

    Args:
        file: `tokenizer.model`.
        version: 2 or 3.

    Raises:
        ModelError: the package sentencepiece is missing, or the file, or it is of another kind.
    """
    pieces = _read(file)
    tokenizer = _bpe(pieces)
    _require_equal(tokenizer, pieces, file)
    count: int = pieces.get_piece_size()
    added = [*SPECIAL, *(ROLES if version == 3 else [])]
    control = [pieces.id_to_piece(i) for i in (pieces.unk_id(), pieces.bos_id(), pieces.eos_id())]
    tokenizer.add_special_tokens(
        [AddedToken(name, normalized=False, special=True) for name in [*control, *added]]
    )
    ids = [tokenizer.token_to_id(name) for name in added]
    if ids != list(range(count, count + len(added))):
        what = "tokenizer.model holds special tokens of its own"
        raise ModelError(what, where=str(file), hint="is it the original file?")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A",
        pair="[gMASK] <sop> $A $B",
        special_tokens=[("[gMASK]", count + 1), ("<sop>", count + 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=control[0],
        pad_token=control[0],
        bos_token=control[1],
        eos_token=control[2],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATES[version]
    return fast


def stop_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The tokens that end an answer."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    roles = [vocabulary[name] for name in STOPS if name in vocabulary]
    return [vocabulary[str(tokenizer.eos_token)], *roles]


def _read(file: Path) -> Any:
    if find_spec("sentencepiece") is None:
        what = "a ChatGLM base needs the package sentencepiece"
        hint = "pip install 'stemtune[sentencepiece]'"
        raise ModelError(what, where="model.base", hint=hint)
    from sentencepiece import SentencePieceProcessor

    if not file.is_file():
        hint = "the original's tokenizer.model belongs beside config.json"
        raise ModelError("there is no tokenizer.model", where=str(file.parent), hint=hint)
    try:
        return SentencePieceProcessor(model_proto=file.read_bytes())  # pyright: ignore
    except (OSError, RuntimeError) as error:
        what = f"tokenizer.model is no model of SentencePiece: {reason_of(error)}"
        hint = "is it whole? GLM-4 has another one: take it in transformers' own format (…-hf)"
        raise ModelError(what, where=str(file), hint=hint) from error


def _bpe(pieces: Any) -> Tokenizer:
    names: list[str] = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={name: i for i, name in enumerate(names)},
            merges=_merges(pieces, names),
            unk_token=names[pieces.unk_id()],
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    # Always a prefix, also before a blank: `Metaspace` would leave it out there.
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def _merges(pieces: Any, names: Seq[str]) -> list[tuple[str, str]]:
    """Which two pieces are joined, best first: SentencePiece joins the two whose union has the
    highest score. Control tokens and bytes are no text, and never the result."""
    plain = [i for i in range(len(names)) if _is_text(pieces, i)]
    known = {names[i] for i in plain}
    return [
        (name[:cut], name[cut:])
        for name in (names[i] for i in sorted(plain, key=lambda i: (-pieces.get_score(i), i)))
        for cut in range(1, len(name))
        if name[:cut] in known and name[cut:] in known
    ]


def _is_text(pieces: Any, number: int) -> bool:
    return not (pieces.is_control(number) or pieces.is_byte(number) or pieces.is_unknown(number))


def _require_equal(tokenizer: Tokenizer, pieces: Any, file: Path) -> None:
    """Refuse a model whose ids would come out differently: of another kind (unigram), with a
    normalizer, or without dummy prefix or bytes. Where pieces have the same score, SentencePiece
    takes the leftmost, which ranks can't tell; a few such pieces are tolerated, and said."""
    names = (pieces.id_to_piece(i) for i in range(pieces.get_piece_size()) if _is_text(pieces, i))
    texts = [*PROBES, *(name.replace("▁", " ") for name in names)]
    wanted: list[list[int]] = pieces.encode(texts)
    found = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    wrong = [text for text, a, b in zip(texts, found, wanted, strict=True) if a != b]
    if wrong and (wrong[0] in PROBES or len(wrong) > TOLERATED * len(texts)):
        what = f"tokenizer.model is not of ChatGLM's kind: {wrong[0]!r} is encoded differently"
        hint = "a BPE with byte fallback, a dummy prefix and no normalizer can be converted"
        raise ModelError(what, where=str(file), hint=hint)
    if wrong:
        log.warning(
            "%d of %d pieces are encoded differently than by SentencePiece, such as %r",
            len(wrong),
            len(texts),
            wrong[0],
        )
