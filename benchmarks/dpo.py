"""Time the same DPO step by several contestants, interleaved in one run.

    python benchmarks/dpo.py --smoke
    python benchmarks/dpo.py --work rag --dtype bfloat16 --json rag-bf16.json

Works:
    rag       pairs of answers to a question with passages, prompts lengthened to --prompt tokens
              with passages of other rows.
    ranked    four ranked answers to each such prompt, each compared with each worse one.
    unshared  pairs whose answers have no token in common, not even of a prompt: what a tree costs
              where it can win nothing.

Every contestant has the reference at hand (`--reference stored`), as all of them
can compute them once before training, or computes them in each step (`--reference live`). Rounds,
peak and ratios are as in sft.py. A contestant that knows only pairs (TRL) is given the four ranked
answers as six pairs; the plain loop computes each answer once.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from base import DTYPES, load_adapted, load_base
from contestants import (
    _adamw,
    _fused_head_on_targets,
    _silence,
    _step_clock,
    autocast,
    trl_settings,
)
from peak import matmul_peak, step_flops
from sft import check_losses, machine, note, quiet, ratios_to_best_peer
from torch import Tensor
from torch.nn import functional as F
from workload import ROOT, Sample, Work, separate_work, shared_work

import stemtune as st
from stemtune.config import Dpo
from stemtune.data.rag import put
from stemtune.objectives import layout_of, loss_of, terms_of, totals_of
from stemtune.plan.pack import pack

BETA = 0.1
PEERS = ("trl", "trl_head", "hand")


@dataclass(frozen=True)
class Group:
    """A prompt and its answers, the best first; an answer is preferred to each behind it.

    `prompts` has one entry for all answers, or one for each, where nothing is shared.
    """

    prompts: list[list[int]]
    answers: list[list[int]]

    def prompt(self, answer: int) -> list[int]:
        """The ids before an answer."""
        return self.prompts[min(answer, len(self.prompts) - 1)]

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Indices of a better and a worse answer."""
        count = range(len(self.answers))
        return [(a, b) for a in count for b in count if a < b]

    def samples(self) -> list[Sample]:
        """Each answer behind its prompt."""
        return [
            Sample(
                self.prompt(n) + answer,
                [False] * len(self.prompt(n)) + [True] * len(answer),
            )
            for n, answer in enumerate(self.answers)
        ]

    def paired(self) -> list[Sample]:
        """Each answer as often as it stands in a pair: what one computes who knows only pairs."""
        own = self.samples()
        return [own[n] for pair in self.pairs for n in pair]


References = list[list[float]]
Step = Callable[[Seq[Group], "References | None"], tuple[float, float]]


def load_groups(options: argparse.Namespace, tokenizer: Any) -> list[Group]:
    """The groups of one step."""
    rows = [json.loads(line) for line in options.data.read_text(encoding="utf-8").splitlines()]
    draw = random.Random(0)
    draw.shuffle(rows)
    passages = [passage for row in rows for passage in row["retrieval_result"]]
    if options.work == "unshared":
        return [_unshared(row, draw, tokenizer) for row in rows[: options.groups]]
    groups: list[Group] = []
    for number, row in enumerate(rows[: options.groups]):
        prompt = _prompt(row, passages[number * 20 :], options.prompt, tokenizer)
        texts = [row["chosen"]["text"], row["rejected"]["text"]]
        if options.work == "ranked":
            others = [rows[-1 - number]["chosen"]["text"], rows[-1 - number]["rejected"]["text"]]
            texts += others
        answers = [_answer(text, tokenizer) for text in texts]
        if options.answer:
            times = [-(-options.answer // len(answer)) for answer in answers]
            answers = [(a * n)[: options.answer] for a, n in zip(answers, times, strict=True)]
        groups.append(Group([prompt], answers))
    return groups


def _prompt(row: dict[str, Any], more: list[str], length: int, tokenizer: Any) -> list[int]:
    """The row's own prompt, as stemtune's default template puts it, with passages of other rows
    until it has about `length` tokens."""
    passages = list(row["retrieval_result"])
    rag = st.Config(data={"path": "x"}).data.rag  # pyright: ignore[reportArgumentType]
    for passage in ["", *more]:
        passages += [passage] if passage else []
        text = put(row["query"], passages, rag)
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
        )
        if len(ids) >= length:
            break
    return list(ids)


def _answer(text: str, tokenizer: Any) -> list[int]:
    return [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]


def _unshared(row: dict[str, Any], draw: random.Random, tokenizer: Any) -> Group:
    """Two answers of about 350 tokens, each behind a prompt of its own."""
    size = len(tokenizer)
    texts = [f"{row['query']} {' '.join(row['retrieval_result'])}"] * 2
    answers = [(_answer(text, tokenizer) * 9)[: 340 + draw.randrange(20)] for text in texts]
    return Group([[draw.randrange(size)] for _ in answers], answers)


# -- contestants ------------------------------------------------------------------------------


def stemtune_tree(model: Any, _tokenizer: Any, budget: int) -> Step:
    """The tree, stemtune's plan of micro-batches and its objective."""
    optimizer = _adamw(model)
    terms = terms_of([Dpo(beta=BETA)])

    def step(groups: Seq[Group], references: References | None) -> tuple[float, float]:
        start = time.perf_counter()
        sequences = [
            st.Sequence(
                sample.input_ids,
                sample.is_target,
                record=number,
                answer=answer,
                role="chosen" if answer == 0 else "rejected",
                preferred_to=range(answer + 1, len(group.answers)),
            )
            for number, group in enumerate(groups)
            for answer, sample in enumerate(group.samples())
        ]
        totals, loss = totals_of(sequences), 0.0
        for batch in pack(sequences, budget, together=True)[0]:
            part = [sequences[n] for n in batch]
            tree = st.build_tree(part)
            with autocast(model):
                if references is None:
                    with torch.no_grad(), model.disable_adapter():
                        theirs = st.target_logprobs(model, tree)
                else:
                    theirs = torch.cat([torch.tensor(references[n]) for n in batch])
                logps = st.target_logprobs(model, tree)
            share, _ = loss_of(terms, logps, theirs, layout_of(part), totals)
            share.backward()
            loss += share.item()
        optimizer.step()
        optimizer.zero_grad()
        return loss, time.perf_counter() - start

    return step


def hand(model: Any, _tokenizer: Any, _budget: int) -> Step:
    """A plain loop without sharing: the answers of a prompt one by one, the head on targets alone,
    each computed once, then the loss of all their pairs."""
    optimizer = _adamw(model)

    def step(groups: Seq[Group], references: References | None) -> tuple[float, float]:
        start = time.perf_counter()
        pairs = sum(len(group.pairs) for group in groups)
        total, first = 0.0, 0
        for group in groups:
            samples = group.samples()
            with autocast(model):
                if references is None:
                    with torch.no_grad(), model.disable_adapter():
                        theirs = [answer_logp(model, sample) for sample in samples]
                else:
                    own = references[first : first + len(samples)]
                    theirs = [torch.tensor(logps).sum() for logps in own]
                ours = [answer_logp(model, sample) for sample in samples]
            first += len(samples)
            h = [a - b for a, b in zip(ours, theirs, strict=True)]
            loss = sum(-F.logsigmoid(BETA * (h[a] - h[b])) for a, b in group.pairs) / pairs
            assert isinstance(loss, Tensor)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total, time.perf_counter() - start

    return step


def answer_logp(model: Any, sample: Sample) -> Tensor:
    """The log-probability of an answer, through the decoder and the head on its targets."""
    base = model.get_base_model()
    ids = torch.tensor(sample.input_ids)
    scored = torch.tensor(sample.is_target)[1:]
    hidden = base.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]
    logits = base.get_output_embeddings()(hidden[scored]).float()
    return -F.cross_entropy(logits, ids[1:][scored], reduction="sum")


def trl(model: Any, tokenizer: Any, _budget: int, *, head_on_targets: bool = False) -> Step:
    """TRL's DPOTrainer at its best on a CPU: one pair a micro-batch, SDPA, no activation
    checkpointing, no truncation. Timed as in contestants.py."""
    import trl as module
    from datasets import Dataset

    config = module.DPOConfig(**trl_settings(model), beta=BETA)
    clock = _step_clock()
    trainer = module.DPOTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    _silence(trainer)

    def step(groups: Seq[Group], references: References | None) -> tuple[float, float]:
        rows: list[dict[str, Any]] = []
        first = 0
        for group in groups:
            for a, b in group.pairs:
                row = {"chosen_ids": group.answers[a], "rejected_ids": group.answers[b]}
                if len(group.prompts) > 1:  # TRL knows one prompt: the rest is part of the answer
                    raise ValueError("TRL needs one prompt for both answers")
                row["prompt_ids"] = group.prompts[0]
                if references is not None:
                    row["ref_chosen_logps"] = sum(references[first + a])
                    row["ref_rejected_logps"] = sum(references[first + b])
                rows.append(row)
            first += len(group.answers)
        trainer.train_dataset = Dataset.from_list(rows)
        trainer.precompute_ref_logps = references is not None
        trainer.args.gradient_accumulation_steps = len(rows)
        with _fused_head_on_targets() if head_on_targets else nullcontext():
            result = trainer.train()
        return float(result.training_loss), clock.seconds

    return step


def trl_head(model: Any, tokenizer: Any, budget: int) -> Step:
    """TRL with its fused head on targets alone: see contestants.py."""
    return trl(model, tokenizer, budget, head_on_targets=True)


CONTESTANTS = {"stemtune": stemtune_tree, "hand": hand, "trl": trl, "trl_head": trl_head}


def work_of(name: str, groups: Seq[Group]) -> Work:
    """What a contestant computes in a step, without the reference."""
    if name == "stemtune":
        return sum((shared_work(group.samples()) for group in groups), Work(0, 0, 0))
    if name == "hand":
        return separate_work([sample for group in groups for sample in group.samples()])
    samples = [sample for group in groups for sample in group.paired()]
    return separate_work(samples, batch=2, head_everywhere=name == "trl")


# -- the run ----------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    shared = ROOT.parent / "shared/data/rag/halueval_preferences.jsonl"
    own = ROOT / "examples/island_rag.jsonl"
    parser.add_argument("--data", type=Path, default=shared if shared.exists() else own)
    parser.add_argument("--work", choices=["rag", "ranked", "unshared"], default="rag")
    parser.add_argument("--groups", type=int, default=2, help="prompts of a step")
    parser.add_argument("--prompt", type=int, default=700, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, help="tokens of an answer (default: its own)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--reference", choices=["stored", "live"], default="stored")
    parser.add_argument("--micro-batch", type=int, default=4096)
    parser.add_argument("--contestants", default="stemtune,hand,trl_head")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-seconds", type=float, default=2.0)
    parser.add_argument("--json", type=Path, help="where to write the raw figures")
    parser.add_argument("--smoke", action="store_true", help="1 prompt, 1 round")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.groups, options.rounds = 1, 1
    options.contestants = options.contestants.split(",")
    return options


def reference_of(model: Any, groups: Seq[Group]) -> References:
    """The base's log-probability of every target, answer by answer."""
    found: References = []
    with torch.no_grad(), model.disable_adapter(), autocast(model):
        for group in groups:
            for sample in group.samples():
                tree = st.build_tree([st.Sequence(sample.input_ids, sample.is_target)])
                found.append(st.target_logprobs(model, tree, "padded").tolist())
    return found


def run(options: argparse.Namespace, groups: list[Group]) -> list[dict[str, Any]]:
    """All rounds; one record for each timed step."""
    steps: dict[str, Step] = {}
    flops: dict[str, float] = {}
    references: References | None = None
    for name in options.contestants:
        model, tokenizer = load_adapted(options.dtype, ours=name == "stemtune")
        steps[name] = CONTESTANTS[name](model, tokenizer, options.micro_batch)
        flops[name] = step_flops(model, work_of(name, groups))
        if options.reference == "stored" and references is None:
            references = reference_of(model, groups)
        own = None if references is None else references[: len(groups[0].answers)]
        warm_up, _ = steps[name](groups[:1], own)
        note(f"ready: {name} (warm-up loss {warm_up:.6f})")
    records: list[dict[str, Any]] = []
    peak = matmul_peak(DTYPES[options.dtype], options.peak_seconds)
    for turn in range(options.rounds):
        shift = turn % len(options.contestants)
        for name in options.contestants[shift:] + options.contestants[:shift]:
            before = peak
            loss, seconds = steps[name](groups, references)
            peak = matmul_peak(DTYPES[options.dtype], options.peak_seconds)
            share = flops[name] / seconds / 1e9 / ((before + peak) / 2)
            record = {"round": turn, "contestant": name, "seconds": seconds, "loss": loss}
            records.append({**record, "share_of_peak": share})
            note(f"round {turn + 1}/{options.rounds}  {name:<10} {seconds:7.2f} s  {loss:.6f}")
    return records


def table(records: list[dict[str, Any]], options: argparse.Namespace, groups: list[Group]) -> str:
    """One line a contestant."""
    heads = ["contestant", "tokens run", "median s", "min", "max", "best peer ÷ it", "of peak"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in options.contestants:
        own = [record for record in records if record["contestant"] == name]
        seconds = [record["seconds"] for record in own]
        ratios = ratios_to_best_peer(records, name)
        share = statistics.median(record["share_of_peak"] for record in own)
        lines.append(
            f"| {name} | {work_of(name, groups).tokens:,} | {statistics.median(seconds):.2f}"
            f" | {min(seconds):.2f} | {max(seconds):.2f}"
            f" | {f'{statistics.median(ratios):.2f}×' if ratios else '–'}"
            f" | {f'{share:.0%}' if options.reference == 'stored' else '–'} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, print the table and the losses, keep the raw figures."""
    options = parse()
    quiet()
    groups = load_groups(options, load_base(options.dtype)[1])
    tokens = sum(len(s.input_ids) for group in groups for s in group.samples())
    distinct = work_of("stemtune", groups).tokens
    note(
        f"{options.work}: {len(groups)} prompts of {[len(g.prompts[0]) for g in groups]} tokens,"
        f" answers of {[[len(a) for a in g.answers] for g in groups]}; {tokens:,} tokens,"
        f" {distinct:,} distinct (ratio {tokens / distinct:.2f}), reference {options.reference},"
        f" {options.dtype}"
    )
    records = run(options, groups)
    if options.json:
        kept = {k: v for k, v in vars(options).items() if k not in ("data", "json")}
        document = {"options": kept, "machine": machine(), "records": records}
        document["tokens"], document["distinct"] = tokens, distinct
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(records, options, groups))
    print()
    print(check_losses(records, options.dtype))


if __name__ == "__main__":
    main()
