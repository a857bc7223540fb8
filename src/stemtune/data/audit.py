"""What looks wrong in rows that can be read: counted, with examples and a remedy."""

import re
from collections.abc import Iterator

from ftfy.badness import BADNESS_RE
from rapidfuzz.fuzz import ratio

from stemtune.data.read import excerpt
from stemtune.data.records import Dialogue, Finding, Place, Preference, Record
from stemtune.data.words import words

ALIKE = 90.0  # per cent, of a chosen and a rejected answer
BROKEN_OFF_WORDS = 20  # a shorter answer may well end without a full stop

REMEDIES = {
    "damaged characters": "the text was decoded wrongly once: repair it (ftfy can), or drop them",
    "control characters": "take them out: nobody types them, and the model would learn to",
    "breaks off": "the answer has no end: complete it, or the model learns to stop mid-sentence",
    "speaks for others": "cut the answer where somebody else begins to speak",
    "begins with a name": "take the name out: the model would learn to write it",
    "control tokens": "another tool's template stands in the text: give the turns as messages",
    "chosen and rejected nearly alike": "little can be learned from them: look whether they differ",
    "another script": "most answers are written in another script: are these meant?",
    "exact duplicates": "they count as often as they stand there; keep one",
    "near duplicates": "they stay together in the split; keep the best one",
    "length outlier": "far longer or shorter than the others: look whether it belongs to them",
    "contradictions": "the same answer to the same prompt is chosen here and rejected there",
}

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f\ufffe\uffff\u200b\u2060\ufeff]")
_TOKENS = re.compile(
    r"<\|[A-Za-z_0-9]{2,30}\|>|\[/?INST\]|<</?SYS>>|</s>|<(?:start|end)_of_turn>"
    r"|^### (?:Instruction|Response|Input):?[ \t]*$",
    re.MULTILINE,
)
_ROLE_LINE = re.compile(
    r"^(?:user|human|assistant|system|bot|ai|用户|助手|问|答)\s*[:：]", re.IGNORECASE | re.MULTILINE
)
_NAMED_LINE = re.compile(r"^([^\s:：][^:：\n]{0,39})(?:: |：)", re.MULTILINE)
_SCRIPTS = {
    "Latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
    "Han": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]"),
    "kana": re.compile(r"[\u3040-\u30ff]"),
    "Cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "Hangul": re.compile(r"[\uac00-\ud7af]"),
    "Arabic": re.compile(r"[\u0600-\u06ff]"),
    "Devanagari": re.compile(r"[\u0900-\u097f]"),
    "Greek": re.compile(r"[\u0370-\u03ff]"),
}


_SPACELESS = re.compile(r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")

Findings = dict[str, Finding]


def merge(into: Findings, other: Findings) -> None:
    """Findings of later rows into those of earlier ones."""
    for kind, finding in other.items():
        into.setdefault(kind, Finding()).merge(finding)


def audit_row(records: list[Record], place: Place, findings: Findings, scripts: Findings) -> None:
    """Look through the answers of one row; each kind of trouble counts once a row.

    Args:
        scripts: rows by the script of their answers, for `minority_scripts`.
    """
    answers = list(_answers(records))
    found: dict[str, str] = {}
    for path, text, names in answers:
        for kind, at in _troubles(text, names):
            found.setdefault(kind, f"{path}: {excerpt(text, at)}")
    for record in records:
        if isinstance(record, Preference):
            for better, worse in record.pairs:
                one, other = record.answers[better].content, record.answers[worse].content
                if ratio(one, other, score_cutoff=ALIKE):
                    found.setdefault("chosen and rejected nearly alike", excerpt(one))
    for kind, text in found.items():
        findings.setdefault(kind, Finding()).add(str(place), text)
    joined = " ".join(text for _, text, _ in answers)[:2000]
    if script := script_of(joined):
        scripts.setdefault(script, Finding()).add(str(place), excerpt(joined))


def _answers(records: list[Record]) -> Iterator[tuple[str, str, set[str]]]:
    """Each trained or compared text of a row, where it stands, and who else speaks there."""
    for record in records:
        if isinstance(record, Dialogue):
            names = set(record.speakers)
            for turn in record.trained:
                yield f"turn {turn}", record.messages[turn].content, names
        elif isinstance(record, Preference):
            for number, answer in enumerate(record.answers):
                yield record.role_of(number), answer.content, set[str]()


def _troubles(text: str, names: set[str]) -> Iterator[tuple[str, int]]:
    if (at := text.find("\ufffd")) >= 0:
        yield "damaged characters", at
    elif not text.isascii() and (bad := BADNESS_RE.search(text)):
        yield "damaged characters", bad.start()
    if match := _CONTROL.search(text):
        yield "control characters", match.start()
    if match := _TOKENS.search(text):
        yield "control tokens", match.start()
    spoken = [m for m in _NAMED_LINE.finditer(text) if m[1] in names]
    if match := _ROLE_LINE.search(text) or (spoken[0] if spoken else None):
        yield ("begins with a name" if match.start() == 0 else "speaks for others"), match.start()
    if _breaks_off(text):
        yield "breaks off", len(text)


def _breaks_off(text: str) -> bool:
    """A last line of some length without an end. Lines of verse and items of lists are short; and
    where a script has no spaces, people often leave out the full stop: there the line must have
    one before, or end with a comma."""
    line = text.rstrip().rpartition("\n")[2]
    if not line or not (line[-1].isalnum() or line[-1] in ",;、，；"):
        return False
    if len(words(line[-400:])) < BROKEN_OFF_WORDS or "://" in line.split()[-1]:
        return False
    return not _SPACELESS.search(line[-1]) or bool(re.search(r"[。！？]", line))


def script_of(text: str) -> str:
    """The script that most letters of a text belong to; empty for a text without letters. Japanese
    is written in Han and kana; a Chinese text may name a Japanese title."""
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    if counts["kana"] * 2 >= counts["Han"]:
        counts["kana"] += counts.pop("Han")
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else ""


def minority_scripts(scripts: Findings) -> Finding:
    """Rows in scripts that at most one in twenty rows is written in."""
    total = sum(finding.count for finding in scripts.values())
    rare = Finding()
    for finding in scripts.values():
        if finding.count * 20 <= total:
            rare.merge(finding)
    return rare
