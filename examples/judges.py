"""Judges for `stemtune eval RUN --generate --judge examples/judges.py:NAME`.

A judge says whether an answer is better than the base's: 1, 0, or anything between; 0.5 is a tie.
"""

import json
import os
import re
import urllib.request

from stemtune.data.overlap import rouge_l

QUESTION = """Two assistants answered the same prompt. Which answer is better? {criterion}

Prompt:
{prompt}

Answer A:
{a}

Answer B:
{b}

Reply with one letter, A or B."""


def by_reference(prompt: str, answer: str, other: str, reference: str) -> float:
    """The one that is closer to the reference, by ROUGE-L."""
    ours, theirs = rouge_l(answer, reference), rouge_l(other, reference)
    return 0.5 if ours == theirs else float(ours > theirs)


def by_endpoint(prompt: str, answer: str, other: str, reference: str) -> float:
    """Asks a model behind an OpenAI-compatible endpoint, with both orders: judges prefer the first.

    Set JUDGE_URL (such as http://localhost:8000/v1), JUDGE_MODEL, and JUDGE_KEY where one is
    needed; keys are read from the environment, never from a file. JUDGE_CRITERION says what is
    better; prompts and answers are sent to that endpoint.
    """
    first = ask(prompt, answer, other) == "A"
    second = ask(prompt, other, answer) == "B"
    return (first + second) / 2


def ask(prompt: str, a: str, b: str) -> str:
    """The endpoint's verdict, A or B."""
    criterion = os.environ.get("JUDGE_CRITERION", "It stays in role and is true to the prompt.")
    text = QUESTION.format(criterion=criterion, prompt=prompt, a=a, b=b)
    body = {
        "model": os.environ["JUDGE_MODEL"],
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "max_tokens": 8,
    }
    request = urllib.request.Request(
        f"{os.environ['JUDGE_URL'].rstrip('/')}/chat/completions",
        json.dumps(body).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": f"Bearer {os.environ.get('JUDGE_KEY', '')}",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        said = json.load(response)["choices"][0]["message"]["content"]
    letter = re.search(r"\b[AB]\b", said.upper())
    return letter[0] if letter else ""
