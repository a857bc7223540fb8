"""The loop: plan → tree → model → objective → backward → optimizer → metrics → checkpoint."""

import logging
import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from torch import Tensor
from transformers import PreTrainedModel

from stemtune import checkpoint, lower, reference
from stemtune.config import Config, Model
from stemtune.data.prepare import Part, Prepared, prepare
from stemtune.data.survey import Survey, survey
from stemtune.data.templates import set_template
from stemtune.errors import DivergedError, Interrupted
from stemtune.export.card import Known
from stemtune.export.hub import login, push
from stemtune.figures import held_out_figures, losses_by_record
from stemtune.fit import heavy_steps
from stemtune.handover import adapter_files, data_facts, push_finished
from stemtune.interrupt import StopRequest
from stemtune.lower import LowerStates
from stemtune.metrics import (
    ConsoleProgress,
    Metrics,
    MetricsFile,
    read_metrics,
    require_trackers,
)
from stemtune.model.activations import checkpoint_activations
from stemtune.model.adapter import adapter_folder, add_adapter, require_adapter, trainable
from stemtune.model.identity import identity, require_same_base
from stemtune.model.load import (
    base_source,
    choose_device,
    fingerprint,
    hashes_of,
    is_converted,
    load_model,
    load_tokenizer,
    require_base,
    require_rows,
)
from stemtune.model.loftq import start_from_residual
from stemtune.model.memory import memory_told, peak_memory
from stemtune.model.offload import require_gpu
from stemtune.model.quantized import require_bitsandbytes, require_trainable
from stemtune.model.save import save_adapter
from stemtune.model.serving import serving_notes
from stemtune.objectives import Objective, Term, Totals, terms_of
from stemtune.optimizer import load_optimizer, make_optimizer, optimizer_tensors
from stemtune.plan.steps import plan_steps
from stemtune.progress import Progress
from stemtune.ranks import join
from stemtune.resume import (
    refuse_differences,
    refuse_new_folder,
    refuse_other_base,
    rounding,
    settle_folder,
    training_settings,
    warn_of_other_rounding,
)
from stemtune.rundir import RunFolder, read_info, write_text
from stemtune.runfile import dump_config
from stemtune.saver import Saver, require_space
from stemtune.score import Scorer
from stemtune.setup import MemoryPlan, checked_backend, resolved
from stemtune.step import Step, StepRunner
from stemtune.tree.sequence import Sequence
from stemtune.update import Updater

log = logging.getLogger(__name__)
WANTED = ("dtype", "attention", "revision")  # of the base: what was asked for, besides what it was
REHEARSED_FROM = 50  # steps: of fewer, trying the largest micro-batch first is no small part


@dataclass(frozen=True)
class Result:
    """What a run leaves behind."""

    output_dir: Path
    adapter_dir: Path
    metrics: Metrics
    """The last step's metrics, and the last evaluation's."""


def train(
    config: Config | Seq[Config],
    *,
    resume: bool = False,
    allow_changes: Seq[str] = (),
    objective: Objective | None = None,
    surveyed: Survey | None = None,
) -> Result:
    """Train an adapter as a run file says.

    Args:
        config: from `load_config`; or several, from `load_stages`, one after another.
        resume: go on from the newest checkpoint of `config.output.dir`; of several stages, those
            that are done are not done again. `output.on_existing: resume` does the same wherever
            there is something to go on with.
        allow_changes: with `resume`, what may differ from the run that was interrupted: `data`,
            `base`, or a setting such as `train.learning_rate`.
        objective: instead of the configured one; see `stemtune.objectives.Objective`.
        surveyed: what `survey` found for this config, if it has been called already.

    Raises:
        StemtuneError: one of its kinds, each with an exit code.
    """
    if isinstance(config, Config):
        return Trainer(
            config,
            resume=resume,
            allow_changes=allow_changes,
            objective=objective,
            surveyed=surveyed,
        ).train()
    stages = list(config)
    refuse_new_folder(stages)
    for stage in stages[1:]:  # what is wrong with a later stage's data is said before the first
        tokenizer = load_tokenizer(stage.model)
        prepare(survey(stage.data, stage.train.seed), tokenizer, stage.data, answers=stage.answers)
    resume = resume or stages[-1].output.on_existing == "resume"
    result: Result | None = None
    for number, stage in enumerate(stages, 1):
        folder = Path(stage.output.dir).absolute()
        state = read_info(folder).get("state") if resume else None
        if state == "done" and number < len(stages):
            log.info("stage %d of %d is done", number, len(stages))
            continue
        log.info("stage %d of %d: %s", number, len(stages), stage.output.dir)
        begun = state is not None and bool(checkpoint.steps(folder / "checkpoints"))
        result = Trainer(stage, resume=begun, allow_changes=allow_changes).train()
    assert result is not None, "there is at least one stage"
    return result


class Trainer:
    """A run: everything that can be refused is refused here, before weights are loaded.

    Args:
        config, resume, allow_changes, objective, surveyed: as for `train`.
    """

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        allow_changes: Seq[str] = (),
        objective: Objective | None = None,
        surveyed: Survey | None = None,
    ) -> None:
        self.ranks = join(choose_device(config.model.device))
        config, resume = self.ranks.same(settle_folder(config, resume))
        self.config = config
        terms = terms_of(config.objective, objective)
        self.progress = Progress()
        path = Path(config.output.dir).absolute()
        self.folder = RunFolder(path, is_writer=self.ranks.is_first)
        self.stop = StopRequest(config.train.time_limit)
        self.saver = Saver(self.folder.checkpoints, config.train)
        self._held_step: int | None = None  # whose weights the model holds, if not the last one's
        surveyed = surveyed or survey(config.data, config.train.seed)
        require_base(config.model)
        require_gpu(config.model, choose_device(config.model.device))
        self.start = require_adapter(config.adapter, config.model)
        lower.require_lower_blocks(config, self.ranks)
        require_trackers(config.tracking)
        if config.train.optimizer != "adamw":
            require_bitsandbytes("train.optimizer")
        for note in serving_notes(config.adapter):
            log.warning("serving this adapter: %s", note)
        if config.output.push_to_hub and not login():
            log.warning("output.push_to_hub: there is no login yet (`hf auth login`)")
        self.folder.claim(resume)
        try:
            with self.folder.phase("preparing data"):
                saved = self._saved(resume)
                self.config = _as_it_began(config, saved)
                require_trainable(base_source(config.model, weights=False), config.model)
                self.tokenizer = load_tokenizer(self.config.model)
                set_template(self.tokenizer, config.data.template)  # it is saved with the adapter
                self.data = self.ranks.after_first(lambda: self._prepared(surveyed))
                if saved is not None:
                    refuse_differences(saved.state, config, self._facts, allow_changes)
                    warn_of_other_rounding(saved.state, self.ranks.size)
                self.plan = self._plan()
            with self.folder.phase("loading the model"), memory_told("loading the model"):
                self._load_model(saved, allow_changes, terms)
        except BaseException:
            self.folder.release()
            raise

    # -- setting up ---------------------------------------------------------------------------

    def _saved(self, resume: bool) -> checkpoint.Checkpoint | None:
        if not resume:
            return None
        saved, passed = checkpoint.newest(self.folder.checkpoints)
        for reason in passed:
            log.warning("passed over %s", reason)
        log.info("resuming from %s", saved.path.name)
        return saved

    def _prepared(self, surveyed: Survey) -> Prepared:
        config = self.config
        return prepare(surveyed, self.tokenizer, config.data, answers=config.answers)

    def _plan(self) -> list[list[int]]:
        train = self.config.train
        return plan_steps(
            self.data.train.groups.tolist(),
            self.data.train.personas.tolist(),
            batching=self.config.data.batching,
            batch_size=train.batch_size,
            epochs=train.num_train_epochs,
            max_steps=train.max_steps,
            seed=train.seed,
        )

    @cached_property
    def _facts(self) -> dict[str, str]:
        """Fingerprints of what a resumed run must find as it was."""
        base = {f"base.{name}": value for name, value in hashes_of(self.config.model).items()}
        return {"data": self.data.fingerprint, "adapter.init_from": self.start, **base}

    def _load_model(
        self, saved: checkpoint.Checkpoint | None, allow_changes: Seq[str], terms: list[Term]
    ) -> None:
        config = self.config
        memory = MemoryPlan(config, self.data.train, self.plan, self.ranks)
        self.memory = memory.facts
        budget = memory.micro_batch_tokens(saved)
        base = self._load_base(memory.config.model, saved, allow_changes)
        self.device = base.device
        self.accelerator = Accelerator(
            cpu=self.device.type == "cpu",
            mixed_precision="fp16" if base.dtype == torch.float16 else "no",
            log_with=list(config.tracking.trackers) or None,
            project_config=ProjectConfiguration(logging_dir=str(self.folder.path / "tensorboard")),
        )
        self._adapt(base, starts_anew=saved is None)
        require_space(self.folder.path, self.parameters.values(), config.train)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.parameters, config.train))
        if saved is None:
            sequences = self.data.train.of(self.plan[0])
            checked = checked_backend(self.model, config.model.attention, sequences)
            backend = self.ranks.same(checked)
            budget = memory.micro_batch_tokens(backend=backend)
        else:
            backend = saved.state["backend"]
        self._make_runners(backend, budget, terms)
        self.resolved = resolved(config, self.model, backend, self.scorer.budget)
        if saved is not None:
            self._restore(saved)

    def _load_base(
        self, model: Model, saved: checkpoint.Checkpoint | None, allow_changes: Seq[str]
    ) -> PreTrainedModel:
        """The base that the data, an earlier stage and a checkpoint are for."""
        init_from = self.config.adapter.init_from
        if init_from is not None:
            require_same_base(adapter_folder(Path(init_from)), self.config.model)
        self.identity = identity(self.config.model)
        base, _ = load_model(model)
        require_rows(base, self.tokenizer, self.data.train.store.largest_id)
        self.base_fingerprint = fingerprint(base)
        if saved is not None:
            refuse_other_base(saved.state, self.base_fingerprint, allow_changes)
        return base

    def _adapt(self, base: PreTrainedModel, *, starts_anew: bool) -> None:
        """Add what is trained."""
        config = self.config
        self.model = add_adapter(
            base,
            config.adapter,
            config.train.seed,
            has_reference=config.has_reference,
        )
        if config.adapter.init_weights == "loftq" and starts_anew:
            start_from_residual(self.model, base_source(config.model), config.train.seed)
        if config.train.activation_checkpointing:
            checkpoint_activations(base)
        self.parameters = trainable(self.model)

    def _make_runners(self, backend: str, budget: int, terms: list[Term]) -> None:
        """What scores sequences, takes the gradient of a step, and updates."""
        config = self.config
        self.scorer = Scorer(self.model, config, backend, budget, self.ranks)
        self.runner = StepRunner(
            self.scorer,
            self.data.train,
            terms,
            self.accelerator,
            self.optimizer,
            activation_offload=config.train.activation_offload,
        )
        self.updater = Updater(
            self.runner,
            self.parameters,
            self.optimizer,
            self.accelerator,
            config.train,
            len(self.plan),
        )

    def _restore(self, saved: checkpoint.Checkpoint) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(saved.tensors["adapter"][name])
        load_optimizer(self.optimizer, self.parameters, saved.tensors["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved.state["scaler"])
        self.progress = Progress(**saved.state["progress"])

    # -- training -----------------------------------------------------------------------------

    def train(self) -> Result:
        """Run to the end of the plan, and save.

        Raises:
            Interrupted: a signal came; everything up to this step is committed.
            DivergedError: a loss or gradient is not finite.
            OutOfMemoryError: not even one sequence fits.
        """
        try:
            with self.folder.phase("training"), self.stop.listening(), memory_told("training"):
                if self.ranks.is_first:
                    self._write_facts()
                self._train_steps()
            with self.folder.phase("saving"), memory_told("saving"):
                result = self._finish()
            # The system counts pages in batches: what was used may seem more than the most ever.
            peak = max(0, int(peak_memory(self.device) * 2**20) - self.memory["used"])
            self.folder.write(memory={**self.memory, "peak": peak})
            self.folder.write(phase="done", state="done")
            if self.ranks.is_first:
                push_finished(self.folder.path, self.config.output)
            return result
        finally:
            self.saver.close()
            for tracker in self.accelerator.trackers:
                tracker.finish()
            self.folder.release()

    def _train_steps(self) -> None:
        total, start = len(self.plan), self.progress.step
        if self.ranks.is_first:
            self.metrics_file = MetricsFile(self.folder.path / "metrics.jsonl", start)
        self.accelerator.init_trackers(self.config.tracking.project)
        console = ConsoleProgress(total, start, quiet=not self.ranks.is_first)
        if reference.wants_stored(self.config.objective):
            with self.folder.phase("computing the reference"):
                self.runner.stored = self._reference()
            self.folder.write(phase="training")
        if self.config.train.keep_lower_states:
            with self.folder.phase("computing the lower states"):
                self.runner.lower = self._lower_states()
            self.folder.write(phase="training")
        if total - start > REHEARSED_FROM:
            self.runner.rehearse(heavy_steps(self.data.train, self.plan[start:], self.config))
        with console.bar:
            self._evaluate_if_due()
            while self.progress.step < total:
                self._stop_if_asked()
                line = self._step(self.plan[self.progress.step])
                if self.progress.step == start + 1:  # now the optimizer has its state
                    self.saver.reserve(self._tensors())
                self._log(line)
                console.step(line)
                self.stop.look_at_clock(needed=2 * line["seconds"])
                self._evaluate_if_due()
                step = self.progress.step
                if step == total or step % self.config.train.save_steps == 0:
                    self._commit()

    @property
    def _eval_steps(self) -> int:
        return self.config.train.eval_steps or self._steps_per_epoch

    def _stop_if_asked(self) -> None:
        if self.ranks.any(self.stop.requested):
            self._commit()
            self.saver.wait()
            self.ranks.wait()
            what = f"stopped at step {self.progress.step} of {len(self.plan)}; it is saved"
            hint = "the same command with --resume goes on"
            raise Interrupted(what, where=str(self.folder.path), hint=hint)

    def _reference(self) -> reference.StoredReference:
        path = self.folder.path / reference.FILE
        key = reference.key_of(self.base_fingerprint, self.start, self.data.fingerprint)
        return reference.load_or_compute(
            path, key, self.data, self.plan, self.scorer, self._stop_if_asked
        )

    def _lower_states(self) -> LowerStates:
        states = LowerStates(self.folder.path / lower.FILE, self.scorer, self.data.train)
        states.compute(self._stop_if_asked)
        return states

    def _step(self, records: Seq[int]) -> Metrics:
        """One optimizer step over exactly these records."""
        figures = self.updater.take(records, self.progress)
        self.progress.step += 1
        step = self.progress.step
        return {
            "step": step,
            "epoch": round(step / self._steps_per_epoch, 4),
            **figures,
            "memory": peak_memory(self.device),
        }

    def compute_loss(
        self, sequences: Seq[Sequence], totals: Totals, return_outputs: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What some sequences of a step add to its loss.

        Args:
            sequences: a micro-batch; where answers are compared, all of a record; for KTO, whose
                baseline is that of a whole step, all of a step.
            totals: of the step: `totals_of` its sequences.
            return_outputs: also return the log-probabilities, fp32 [T].
        """
        references, baseline = self.scorer.reference(sequences), self.scorer.baseline(sequences)
        part = Step(list(sequences), totals, references, baseline)
        loss, logps, _ = self.runner.loss(part)
        return (loss, logps) if return_outputs else loss

    # -- evaluation ---------------------------------------------------------------------------

    def evaluate(self, prefix: str = "eval") -> Metrics:
        """Score the held-out records, without dropout.

        Returns:
            `{prefix}_loss` and the other names of `supervised_figures` or `preference_figures`;
            empty without such records.
        """
        part = self.data.eval
        if not len(part):
            return {}
        has = self.scorer.has_reference
        references = self.runner.references(part, range(len(part))) if has else None
        logps = self.scorer.part_logps(part)
        figures = held_out_figures(part, self.scorer, self.runner.terms, logps, references)
        return {f"{prefix}_{name}": value for name, value in figures.items()}

    def record_losses(self, part: Part) -> list[list[float]]:
        """For each record the loss of each of its targets."""
        return losses_by_record(part, self.scorer.part_logps(part))

    def _evaluate_if_due(self) -> None:
        """At the start, at the end, and every so many steps; once."""
        step = self.progress.step
        due = step == len(self.plan) or step % self._eval_steps == 0
        if due and step != self.progress.evaluated:
            self._evaluate_and_log()

    def _evaluate_and_log(self) -> None:
        with self.folder.phase("evaluating"), self.scorer.asking(self._stop_if_asked):
            metrics = self.evaluate()
        self.folder.write(phase="training")
        step = self.progress.evaluated = self.progress.step
        if not metrics:
            return
        if not math.isfinite(metrics["eval_loss"]):
            self._held_out_diverged(metrics["eval_loss"])
        self._log({"step": step, **metrics})
        log.info("step %d  held-out loss %.4f", step, metrics["eval_loss"])
        best = self.progress.best_loss
        if best is None or metrics["eval_loss"] < best:
            self.progress.best_loss = metrics["eval_loss"]
            self.progress.best_step = step
            if step:
                self._commit()

    def _held_out_diverged(self, loss: float) -> NoReturn:
        part = self.data.eval
        numbers = enumerate(self.record_losses(part))
        bad = [number for number, losses in numbers if not all(map(math.isfinite, losses))]
        where = ", ".join(str(part.place(number)) for number in bad[:3]) or "the held-out records"
        hint = "lower train.learning_rate, or look at these rows"
        raise DivergedError(
            f"step {self.progress.step}: the held-out loss is {loss}", where=where, hint=hint
        )

    # -- keeping ------------------------------------------------------------------------------

    def _log(self, line: Metrics) -> None:
        self.progress.metrics = {**(self.progress.metrics or {}), **line}
        if not self.ranks.is_first:
            return
        self.metrics_file.write(line)
        numbers = {name: v for name, v in line.items() if name != "step" and v is not None}
        self.accelerator.log(numbers, step=line["step"])

    def _commit(self) -> None:
        if not self.ranks.is_first:
            return
        state = {
            "progress": self.progress.__dict__,
            "dtype": self.resolved.model.dtype,
            "revision": self.resolved.model.revision,
            "backend": self.scorer.backend,
            "wanted": {key: getattr(self.config.model, key) for key in WANTED},
            "budget": self.scorer.budget,
            "base": self.base_fingerprint,
            "facts": self._facts,
            "settings": training_settings(self.config),
            "rounding": rounding(self.ranks.size),
            "scaler": self.accelerator.scaler and self.accelerator.scaler.state_dict(),
        }
        with self.folder.phase("saving"):
            self.metrics_file.sync()  # a checkpoint is not to know more than its metrics
            self.saver.save(self.progress.step, self._tensors(), state, self.progress.best_step)
        self.folder.write(phase="training", saving=vars(self.saver.cost))

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """What a checkpoint keeps of model and optimizer."""
        return {
            "adapter": {name: p.data for name, p in self.parameters.items()},
            "optimizer": optimizer_tensors(self.optimizer, self.parameters),
        }

    def _finish(self) -> Result:
        """Write `adapter/`: the best or the last, and the other one beside it."""
        if not self.ranks.is_first:
            self.ranks.wait()
            return self._result()
        self.saver.wait()
        best, last = self.progress.best_step, self.progress.step
        wanted = self.config.output.final_adapter
        other = "last" if wanted == "best" else "best"
        if best == 0:
            log.warning("no step was better than the start: adapter/ holds the last one")
        if best in (None, 0, last):
            self.save_model(self.folder.path / "adapter")
        else:
            weights = {"last": last, "best": best}
            for name in (other, wanted):  # the model keeps what adapter/ holds
                path = self.folder.checkpoints / f"step-{weights[name]:06d}"
                tensors = checkpoint.read(path).tensors["adapter"]
                with torch.no_grad():
                    for key, parameter in self.parameters.items():
                        parameter.copy_(tensors[key])
                self._held_step = weights[name]
                folder = "adapter" if name == wanted else f"adapter-{name}"
                self.save_model(self.folder.path / folder)
        if self.runner.lower is not None:
            self.runner.lower.remove()
        self.ranks.wait()
        return self._result()

    def _result(self) -> Result:
        return Result(self.folder.path, self.folder.path / "adapter", self.progress.metrics or {})

    def save_model(self, folder: str | Path) -> None:
        """Write the adapter as it is now, in PEFT's format, with tokenizer, template, the settings
        of generation, and a model card."""
        lines = read_metrics(self.folder.path / "metrics.jsonl")
        step = self.progress.step if self._held_step is None else self._held_step
        known = Known(self.resolved, self.folder.info, lines, step)
        files = adapter_files(known, self.model, self.tokenizer, self.data.memories)
        save_adapter(self.model, self.tokenizer, Path(folder), self.resolved, self.identity, files)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = True,
        create: bool = True,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        include: Seq[str] = (),
        exclude: Seq[str] = (),
    ) -> str:
        """Push `adapter/`, which `train` leaves, to a repository of the Hub.

        Args:
            repo_id, private, create, commit_message, revision, create_pr, include, exclude: as for
                `stemtune.export.hub.push`.

        Returns:
            Its address.

        Raises:
            StemtuneError: see `stemtune.export.hub.push`.
        """
        return push(
            self.folder.path / "adapter",
            repo_id,
            private=private,
            create=create,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            include=include,
            exclude=exclude,
        )

    def _write_facts(self) -> None:
        """The resolved run file, and in `run.json` what the data gave."""
        write_text(self.folder.path / "config.yaml", dump_config(self.resolved))
        self.folder.write(
            base={
                "name": self.config.model.base,
                "revision": self.resolved.model.revision,
                "weights": self.base_fingerprint,
                "files": hashes_of(self.config.model),
                "converted": is_converted(self.config.model),
            },
            attention=self.scorer.backend,
            memory=self.memory,
            steps=len(self.plan),
            **data_facts(self.data),
        )

    # -- small things -------------------------------------------------------------------------

    @property
    def _steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / self.config.train.batch_size)


def _as_it_began(config: Config, saved: checkpoint.Checkpoint | None) -> Config:
    """With the dtype that `auto` chose then, whose measurement could come out differently now, and
    the commit that a branch of the Hub pointed to, which may have moved."""
    if saved is None:
        return config
    kept = {key: saved.state[key] for key in ("dtype", "revision")}
    return config.model_copy(update={"model": config.model.model_copy(update=kept)})
