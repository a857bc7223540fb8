"""A tokenizer as llama.cpp keeps it: its tokens, their kinds, and how a text is cut before.

llama.cpp knows its ways of cutting by name alone. A name is written only for a tokenizer whose own
rules are those behind that name, letter for letter; any other is refused.
"""

import json
import logging
import re
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from stemtune.data.records import Message
from stemtune.data.renderer import Renderer, special_ids
from stemtune.errors import ModelError

log = logging.getLogger(__name__)

# What `tokenizers` cuts by; the patterns as they stand in `tokenizer.json`.
GPT2 = "ByteLevel"  # a pattern of its own
DIGITS = "Digits"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
BLANKS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{BLANKS}"
QWEN2 = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{BLANKS}"
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
SLASHED = BLANKS.replace(r"[\r\n]*", r"[\r\n/]*", 1)
TEKKEN = rf"{UPPER}*{LOWER}+|{UPPER}+{LOWER}*|\p{{N}}|{SLASHED}"
# By the cuts, and whether a whole word that is a token stays one without merges.
NAMED_CUTS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), True): "llama-bpe",
    ((LLAMA3,), False): "smaug-bpe",
    ((QWEN2,), False): "qwen2",
    ((TEKKEN,), True): "tekken",
}
BLANK = "▁"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNUSED_SCORE = -1e6
# In a model of this name special tokens swallow the blanks behind them, all but these: llama.cpp
# goes by the name, and fails to load a model that lacks any of those it looks for.
GREEDY_NAME = re.compile("phi-?3", re.IGNORECASE)
NOT_GREEDY = {"<unk>", "<s>", "<|endoftext|>"}
LOOKED_FOR = {"</s>", *NOT_GREEDY}
# A chat template that prompts by the last text alone. It looks at the others, too: what a template
# does not look at, llama.cpp puts into the user's turn.
PLAIN = (
    "{% for m in messages %}{% if loop.last %}{{ m['content'] }}{% elif m['content'] %}{% endif %}"
    "{% endfor %}"
)


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer.

    Attributes:
        model: `gpt2` for merges of bytes, `llama` for scores of pieces.
        cut: llama.cpp's name for what cuts a text.
        tokens: by id, one for each row of the embeddings.
        merges: of `gpt2`, best first.
        scores: of `llama`, by id.
        blank_first: of `llama`: whether a text, and what follows a special token, gets a blank.
        greedy: whether special tokens swallow the blanks behind them, as Phi-3's do.
    """

    model: str
    cut: str
    tokens: list[str]
    kinds: list[TokenType]
    merges: list[str] = field(default_factory=list[str])
    scores: list[float] = field(default_factory=list[float])
    blank_first: bool = False
    greedy: bool = False

    def name_for(self, name: str) -> str:
        """A model's name, such that llama.cpp reads out of it whether its tokens are greedy."""
        without = GREEDY_NAME.sub("phi", name)
        return f"Phi-3-{without}" if self.greedy else without

    def add_to(self, writer: GGUFWriter, renderer: Renderer) -> None:
        """Write it, with its special tokens and the chat template of training."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.cut)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.blank_first)
        tokenizer: Any = renderer.tokenizer
        for name in ("bos", "eos", "unk", "pad"):
            token_id: int | None = getattr(tokenizer, f"{name}_token_id")
            if token_id is not None:
                getattr(writer, f"add_{name}_token_id")(token_id)
        if renderer.turn_end is not None:
            writer.add_eot_token_id(renderer.turn_end)
        writer.add_add_bos_token(adds_bos(renderer))
        writer.add_add_eos_token(False)
        writer.add_chat_template(PLAIN if renderer.plain else tokenizer.get_chat_template())


def adds_bos(renderer: Renderer) -> bool:
    """Whether a prompt begins with what the tokenizer itself puts before a text. llama.cpp puts it
    there, and takes it away from what the template writes."""
    tokenizer: Any = renderer.tokenizer
    bos: int | None = tokenizer.bos_token_id
    itself: list[int] = tokenizer("a")["input_ids"]
    return bos is not None and itself[0] == bos and _prompt(renderer)[0] == bos


def _prompt(renderer: Renderer) -> list[int]:
    return renderer.prompt([Message("user", "a")])


def vocabulary_of(renderer: Renderer, rows: int, where: str) -> Vocabulary:
    """What llama.cpp needs to tokenise as training did.

    Args:
        renderer: of the training prompts.
        rows: of the embeddings. Tokens beyond them could never be used, and are left out.
        where: the tokenizer, for errors.

    Raises:
        ModelError: llama.cpp would tokenise otherwise.
    """
    tokenizer = renderer.tokenizer
    if not tokenizer.is_fast:
        raise _refusal("the tokenizer has no tokenizer.json", where)
    spec = json.loads(tokenizer.backend_tokenizer.to_str())  # pyright: ignore
    greedy = _are_greedy(spec, where)
    model = spec["model"]
    odd = [k for k in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(k)]
    if model["type"] != "BPE" or odd:
        raise _refusal(f"a tokenizer of type {model['type']} {' '.join(odd)}".strip(), where)
    tokens, kinds = _tokens(tokenizer, spec, rows)
    pairs: list[list[str]] = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    if not model.get("byte_fallback"):
        merges = [" ".join(pair) for pair in pairs]
        return Vocabulary("gpt2", _cut(spec, where), tokens, kinds, merges, greedy=greedy)
    if not all(f"<0x{byte:02X}>" in model["vocab"] for byte in range(256)):
        raise _refusal("the tokenizer has no tokens for all bytes", where)
    first = _blank_first(spec, renderer, where)
    scores = _scores(pairs, tokens, where)
    return Vocabulary("llama", "default", tokens, kinds, [], scores, first, greedy)


def _refusal(what: str, where: str) -> ModelError:
    hint = "llama.cpp would tokenise otherwise; `stemtune merge` writes it for other engines"
    return ModelError(what, where=where, hint=hint)


def _are_greedy(spec: dict[str, Any], where: str) -> bool:
    """Whether special tokens swallow the blanks behind them: all of them, but for those that
    llama.cpp leaves out, or none."""
    added = {token["content"]: token for token in spec["added_tokens"]}
    greedy = {text for text, token in added.items() if token["rstrip"]}
    odd = {text for text, token in added.items() if token["lstrip"] or token["single_word"]}
    known = set(added) | set(spec["model"]["vocab"])
    if odd or (greedy and (greedy != added.keys() - NOT_GREEDY or not known >= LOOKED_FOR)):
        raise _refusal(f"llama.cpp keeps the blanks around {min(odd | greedy)!r}", where)
    return bool(greedy)


def _tokens(
    tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any], rows: int
) -> tuple[list[str], list[TokenType]]:
    """By id; rows without a token get a name that no text has."""
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    added: set[int] = {token["id"] for token in spec["added_tokens"]}
    special = special_ids(tokenizer)
    pieces = bool(spec["model"].get("byte_fallback"))
    unknown = spec["model"].get("unk_token")
    for text, token_id in tokenizer.get_vocab().items():
        if token_id >= rows:
            continue
        tokens[token_id] = text
        kind = TokenType.NORMAL
        if pieces and BYTE.fullmatch(text):
            kind = TokenType.BYTE
        elif pieces and text == unknown:
            kind = TokenType.UNKNOWN
        elif token_id in added and token_id in special:
            kind = TokenType.CONTROL
        elif token_id in added:
            kind = TokenType.USER_DEFINED
            tokens[token_id] = text.replace(BLANK, " ")
        kinds[token_id] = kind
    return tokens, kinds


def _cut(spec: dict[str, Any], where: str) -> str:
    """llama.cpp's name for what comes before the merges of bytes."""
    # Texts in composed form, as nearly all are, are not changed by NFC; llama.cpp has none.
    normalizer = spec["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":
        raise _refusal(f"a normalizer of type {normalizer['type']}", where)
    cuts = tuple(_cuts(spec["pre_tokenizer"]))
    name = NAMED_CUTS.get((cuts, bool(spec["model"].get("ignore_merges"))))
    if name is None:
        raise _refusal(f"llama.cpp has no name for how this tokenizer cuts: {cuts}", where)
    if name == "tekken":  # its pattern there knows no marks
        log.warning("llama.cpp cuts words with combining marks a little otherwise")
    return name


def _cuts(part: dict[str, Any] | None) -> list[str]:
    """The steps of a pre-tokenizer, in words that `NAMED_CUTS` has, or in its own."""
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [cut for inner in part["pretokenizers"] for cut in _cuts(inner)]
    if part["type"] == "ByteLevel" and not part["add_prefix_space"]:
        return [GPT2] if part["use_regex"] else []
    if part["type"] == "Digits" and part["individual_digits"]:
        return [DIGITS]
    if part["type"] == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return list(part["pattern"].values())
    return [json.dumps(part)]


def _blank_first(spec: dict[str, Any], renderer: Renderer, where: str) -> bool:
    """Whether a blank is put before each text between special tokens. Other rules for pieces are
    refused."""
    blank_first, known = False, True
    for part in _parts(spec["normalizer"], "normalizers"):
        if part == {"type": "Prepend", "prepend": BLANK}:
            blank_first = True
        elif part != {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}:
            known = False
    for part in _parts(spec["pre_tokenizer"], "pretokenizers"):
        if part["type"] == "Metaspace" and part["replacement"] == BLANK and not part["split"]:
            scheme = part["prepend_scheme"]
            # Before the text alone: as if always, or never, as far as prompts are concerned.
            first = renderer.plain or _prompt(renderer)[0] not in special_ids(renderer.tokenizer)
            known = known and (scheme != "first" or renderer.plain or not first)
            blank_first = scheme == "always" or (scheme == "first" and first)
        elif part["type"] != "Split" or part["pattern"] != {"String": " "}:
            known = False
    if not known:
        raise _refusal("how this tokenizer cuts: llama.cpp has no such rule", where)
    return blank_first


def _parts(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return part[inner] if part["type"] == "Sequence" else [part]


def _scores(pairs: Seq[Seq[str]], tokens: list[str], where: str) -> list[float]:
    """A score for each piece, such that the best one first is the first merge first."""
    ranks: dict[str, int] = {}
    last = ""
    for rank, pair in enumerate(pairs):
        made = "".join(pair)
        if made != last and made in ranks:
            raise _refusal(f"merges that make {made!r} at different ranks", where)
        ranks.setdefault(made, rank)
        last = made
    return [-float(ranks[token]) if token in ranks else UNUSED_SCORE for token in tokens]
