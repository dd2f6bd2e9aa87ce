"""Generating pictures: two networks trained against each other, samples, and their quality in numbers and pictures."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer
from torchmetrics import SumMetric

from zoo.running.generated_pictures import kept, log_animation, tiles, tiles_figure
from zoo.running.optimizing import SchedulerCallable, configure_optimizers
from zoo.running.pictures import contact_sheet, log_picture
from zoo.tasks.adversarial import UNDECIDED, Loss, discriminator_loss, generator_loss, step, unsynchronized
from zoo.tasks.generation_scores import GenerationScores, load_classifier, see
from zoo.weights import NOT_SAVED, describe

AT_ONCE = 256  # pictures that are generated at a time
SHOWN = 64  # pictures on a sheet of samples
STEPS = 12  # of an interpolation, and as many of these: the assignment's last figure
ALIKE = 3  # pictures whose codes are averaged for latent arithmetic, as in the lecture
BEATEN = 0.05  # of the undecided discriminator's loss: less means that it knows nearly always


class GenerationTask(LightningModule):
    """Abstract: a subclass sets ``generator`` and ``discriminator`` and defines ``forward`` and ``score``.

    ``forward`` makes images from codes, and ``score`` judges images. A subclass without a discriminator defines
    ``training_step`` and ``configure_optimizers`` in their place.

    A batch is ``(images, labels)`` as in classification: images float32 (N, C, H, W) in [0, 1], labels int64 (N,),
    which an unconditional model does not look at; a batch of an evaluation may be empty.

    Each batch is a step of the discriminator and then one of the generator, on codes drawn anew; together they count as
    one step of the run. ``trainer.gradient_clip_val`` clips either network's gradients, and with
    ``trainer.accumulate_grad_batches`` both steps are those of one larger batch, but for batch norm.

    An evaluation generates as many pictures as it is given, the labels' ones where the model is conditional, the same
    ones each time and on any number of processes. Logs ``train/discriminator_loss`` and ``train/generator_loss`` (of
    the batch, every ``log_every_n_steps``), ``test/samples``, the number of pictures that were compared, and with a
    classifier what :class:`~zoo.tasks.generation_scores.GenerationScores` says, as ``val/classifier_fid``, ….

    Args:
        code_size: Length of a code z.
        num_classes: Of a conditional model; None if it is not.
        class_names: Their names; None calls them "0", "1", ….
        loss: ``gan`` or ``lsgan``.
        classifier: As :func:`~zoo.tasks.generation_scores.load_classifier` takes it; None leaves those numbers out.
        optimizer: Makes the optimizer of either network from its parameters.
        scheduler: Makes the schedule from an optimizer and the run's number of steps.
    """

    monitor_mode = "min"

    generator: torch.nn.Module
    discriminator: torch.nn.Module
    example_input_array: Tensor

    def __init__(
        self,
        code_size: int,
        num_classes: int | None,
        class_names: list[str] | None,
        loss: Loss,
        classifier: str | None,
        optimizer: OptimizerCallable,
        scheduler: SchedulerCallable | None,
    ) -> None:
        super().__init__()
        if code_size < 1:
            raise ValueError(f"code_size={code_size} must be at least 1")
        if num_classes is not None and class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class_names were given for num_classes={num_classes}")
        # A classifier judges; it is no part of the model, and a checkpoint does not look for its file.
        self.save_hyperparameters(ignore=[*NOT_SAVED, "classifier"])
        self.code_size = code_size
        self.classes = num_classes
        self.class_names = class_names or [str(k) for k in range(num_classes or 0)]
        self.loss = loss
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.example_input_array = torch.zeros(1, code_size)
        self.monitor = "val/classifier_fid" if classifier else None
        self._judge = [load_classifier(classifier)] if classifier else []  # in a list: no part of the model
        self.val_scores = GenerationScores(self._judge[0], neighbourhoods=False) if classifier else None
        self.test_scores = GenerationScores(self._judge[0]) if classifier else None
        self.test_count = SumMetric()
        self._seen = 0  # pictures of this evaluation, on this process
        self._window: list[tuple[Tensor, Tensor]] = []  # batches since the last step
        self._frames: dict[int, np.ndarray] = {}  # sheets of samples, by the number of the validation
        self._sheets = 0  # that were made
        self._most_classes = 0
        self.doubts: dict[str, str] = {}  # of metrics of the last test: why not to rely on them, for the report
        self._told_apart: list[Tensor] = []  # the discriminator's losses of this epoch

    def score(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The discriminator's scores (N,) of images (N, C, H, W) in [0, 1]: logits, or of least squares numbers."""
        raise NotImplementedError(f"{type(self).__name__} must define score()")

    def draw_codes(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Codes (n, code_size) of the standard normal distribution, on the device; a generator is the CPU's."""
        device = self.device if generator is None else None
        return torch.randn(n, self.code_size, generator=generator, device=device).to(self.device)

    def sample(self, n: int, labels: int | Sequence[int] | Tensor | None = None, seed: int | None = None) -> Tensor:
        """Generate pictures, in evaluation mode: each depends on its own code alone.

        Args:
            n: How many.
            labels: Of a conditional model the class of all, or of each; None takes the classes in turn.
            seed: Seed of the codes; None draws other ones each time.

        Returns:
            float32 (n, C, H, W) in [0, 1].

        Raises:
            ValueError: ``labels`` do not go with the model or with ``n``.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return self.decode(self.draw_codes(n, generator), self._asked(n, labels))

    def decode(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """Pictures (N, C, H, W) in [0, 1] of codes (N, code_size), in evaluation mode and without gradients.

        Args:
            codes: On the model's device.
            labels: Of a conditional model int64 (N,); None takes the classes in turn.
        """
        labels = self._asked(len(codes), labels)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                of_each = labels.split(AT_ONCE) if labels is not None else [None] * (len(codes) // AT_ONCE + 1)
                shares = zip(codes.split(AT_ONCE), of_each, strict=False)
                return torch.cat([self(some, of) for some, of in shares])
        finally:
            self.train(training)

    def _asked(self, n: int, labels: int | Sequence[int] | Tensor | None) -> Tensor | None:
        """The class of each of n pictures, int64 (n,); None where the model knows no classes."""
        if self.classes is None:
            if labels is not None:
                raise ValueError(f"this {type(self).__name__} is not conditional: it takes no labels")
            return None
        if labels is None:
            return torch.arange(n, device=self.device) % self.classes
        asked = torch.as_tensor(labels, device=self.device)
        asked = asked.expand(n) if asked.ndim == 0 else asked
        if (
            asked.shape != (n,)
            or asked.is_floating_point()
            or (n and not 0 <= asked.min() <= asked.max() < self.classes)
        ):
            raise ValueError(f"labels must be one class, or {n}, each from 0 to {self.classes - 1}")
        return asked.long()

    def run_layers(self, codes: Tensor) -> None:
        """Run both networks once on codes (1, Z), also without values: for the table of their layers."""
        labels = torch.zeros_like(codes[:, 0], dtype=torch.int64) if self.classes is not None else None
        self.eval()
        self.score(self(codes, labels), labels)

    # Training

    def configure_callbacks(self) -> list[Callback]:
        """None; Lightning asks for them before it refuses flags of a module that optimizes by hand.

        Clipping and accumulation are refused there. Here both are done, so that the module says only afterwards, in
        :meth:`configure_optimizers`, that it optimizes by hand.
        """
        if self.trainer.state.fn == "fit":
            self.automatic_optimization = True
        return []

    def setup(self, stage: str) -> None:
        """Forget what another fit has left."""
        if stage == "fit":
            self._window, self._frames, self._told_apart, self._most_classes, self._sheets = [], {}, [], 0, 0
        if not self._judge:
            rank_zero_info("no classifier: classifier_fid and the other numbers of quality are left out")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The recipe's optimizer for the discriminator and another one for the generator, their schedules in steps."""
        self.automatic_optimization = False
        both: Any = []
        for network in (self.discriminator, self.generator):
            made: Any = configure_optimizers(self, self.optimizer, self.scheduler, network)
            if isinstance(made, dict):
                made["lr_scheduler"] = made["lr_scheduler"]["scheduler"]  # stepped below, after each step
            both.append(made)
        return both

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        """Both networks' steps, on this batch or on all since the last ones; returns the sum of their losses."""
        self._window.append(batch)
        if self.trainer.fit_loop._should_accumulate():
            return None
        window, self._window = self._window, []
        with unsynchronized(self.trainer):
            of_discriminator, of_generator = self._duel(window)
        schedules: Any = self.lr_schedulers()
        for schedule in schedules or []:
            schedule.step()
        self._told_apart.append(of_discriminator)
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and self.global_step % every == 0:
            losses = {"train/discriminator_loss": of_discriminator, "train/generator_loss": of_generator}
            self.log_dict(losses, prog_bar=True)
        return of_discriminator + of_generator

    def _duel(self, window: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """A step of the discriminator and one of the generator on some batches; their losses."""
        optimizers: Any = self.optimizers()
        for_discriminator, for_generator = optimizers
        batches = [(images.to(self.device), self._classes_of(labels.to(self.device))) for images, labels in window]
        losses = [
            self._backward("discriminator_loss", self.discriminator_loss(*batch), len(batches)) for batch in batches
        ]
        # Of what the wrapper holds: one step of the run is both networks'.
        step(self.trainer, self.discriminator, for_discriminator.optimizer)
        self.toggle_optimizer(for_generator)  # else the discriminator would collect gradients of the generator's loss
        fooling = [self._backward("generator_loss", self.generator_loss(*batch), len(batches)) for batch in batches]
        step(self.trainer, self.generator, for_generator)
        self.untoggle_optimizer(for_generator)
        return torch.stack(losses).sum(), torch.stack(fooling).sum()

    def discriminator_loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Its loss, a scalar, on real images (N, C, H, W) and as many generated ones.

        They are judged apart: together they would share the statistics of a batch norm.
        """
        with torch.no_grad():
            generated = self(self.draw_codes(len(images)), labels)
        return discriminator_loss(self.score(images, labels), self.score(generated, labels), self.loss)

    def generator_loss(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Its loss, a scalar, on as many generated images as there are real ones."""
        generated = self(self.draw_codes(len(images)), labels)
        return generator_loss(self.score(generated, labels), self.loss)

    def _backward(self, name: str, loss: Tensor, batches: int) -> Tensor:
        """Collect the gradients of a batch's share of the loss."""
        self.loss_terms = {name: loss.detach()}  # for zoo.running.nonfinite
        self.manual_backward(loss / batches)
        return loss.detach() / batches

    def _classes_of(self, labels: Tensor) -> Tensor | None:
        """What a conditional model is asked for; of mixed images the class with the largest share."""
        if self.classes is None:
            return None
        return labels if labels.ndim == 1 else labels.argmax(1)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clip, here where gradients are no longer scaled for float16."""
        if not self.automatic_optimization:
            self.clip_gradients(optimizer)

    def on_train_epoch_end(self) -> None:
        """Say when the discriminator knows nearly always: the generator then hardly learns from it."""
        losses, self._told_apart = self._told_apart, []
        if losses and (mean := float(torch.stack(losses).mean())) < BEATEN * UNDECIDED[self.loss]:
            rank_zero_warn(
                f"epoch {self.current_epoch}: the discriminator tells real from generated pictures nearly always (loss "
                f"{mean:.4f}; {UNDECIDED[self.loss]:.2f} is undecided), so that the generator hardly learns. A smaller "
                "learning rate, a smaller discriminator or loss: lsgan usually helps"
            )

    # Evaluation

    def measure(self, stage: str, images: Tensor, labels: Tensor | None, codes: Tensor) -> None:
        """Count a batch of an evaluation beyond the pictures' quality; nothing, but in subclasses.

        Args:
            stage: ``val`` or ``test``.
            images: (N, C, H, W) in [0, 1]; N may be 0.
            labels: Of a conditional model (N,).
            codes: (N, code_size): the same for the same picture in each evaluation.
        """

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Count a batch of the validation split, beside as many generated pictures."""
        self._evaluate("val", self.val_scores, batch)

    def on_validation_epoch_end(self) -> None:
        """Log the numbers over all processes; show the pictures of the same codes again."""
        self._seen = 0
        if self.val_scores is not None:
            numbers = self.val_scores.compute()
            self._log_numbers("val", numbers)
            self._watch_classes(int(numbers["sample_classes"]), self.val_scores.missing())
            self.val_scores.reset()
        if self.trainer.is_global_zero and self.trainer.loggers and not self.trainer.sanity_checking:
            self._show_samples()

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Count a batch of the test split, beside as many generated pictures, which are returned, (N, C, H, W)."""
        self.test_count.update(float(len(batch[0])))
        return self._evaluate("test", self.test_scores, batch)

    def on_test_epoch_end(self) -> None:
        """Log the numbers over all processes, samples with what the classifier sees, and the codes' neighbourhood."""
        self._seen = 0
        self.log("test/samples", self.test_count)
        if self.test_scores is not None:
            numbers = self.test_scores.compute()
            self._log_numbers("test", numbers)
            if missing := self.test_scores.missing():
                rank_zero_warn(f"of {', '.join(missing)} there are hardly any generated pictures: mode collapse")
            self._doubt(int(self.test_count.compute()), self.test_scores.fid.features)
            self.test_scores.reset()
        if self.trainer.is_global_zero and self.trainer.loggers:
            self._show_codes("test")
            codes = self._codes_at(range(32))
            log_picture(self, "test/samples", self._captioned(codes, self._asked(32, None)))

    def _evaluate(self, stage: str, scores: GenerationScores | None, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        asked = self._classes_of(labels)
        codes = self._codes_at(self._places(len(images)))
        self.measure(stage, images, asked, codes)
        generated = self.decode(codes, asked) if len(images) else images
        if scores is not None:
            scores.update(images, real=True)
            scores.update(generated, real=False, asked=asked)
        return generated

    def _places(self, n: int) -> range:
        """The places of the next n pictures of this process in the whole data: r, r + k, r + 2k, … of process r."""
        rank, processes = self.trainer.global_rank, self.trainer.world_size
        first, self._seen = self._seen, self._seen + n
        return range(rank + processes * first, rank + processes * (first + n), processes)

    def _codes_at(self, places: range) -> Tensor:
        """A code (1, code_size) for each place, whoever asks for it."""
        generator = torch.Generator()
        codes = [self.draw_codes(1, generator.manual_seed(place)) for place in places]
        return torch.cat([torch.zeros(0, self.code_size, device=self.device), *codes])

    def _log_numbers(self, stage: str, numbers: dict[str, Tensor]) -> None:
        for name, value in numbers.items():
            self.log(f"{stage}/{name}", float(value), prog_bar=name == "classifier_fid")

    def _doubt(self, count: int, features: int) -> None:
        """Say of a distance of too few pictures that it is not to be relied upon."""
        self.doubts = {}
        if count <= features:
            doubt = f"unreliable: of {count} pictures, which with {features} features come out far too far apart"
            self.doubts["test/classifier_fid"] = doubt
            rank_zero_warn(f"test/classifier_fid is {doubt}")

    def _watch_classes(self, classes: int, missing: list[str]) -> None:
        """Say when classes are lost that there were before."""
        if self.trainer.sanity_checking:
            return
        if classes <= self._most_classes / 2:
            rank_zero_warn(
                f"epoch {self.current_epoch}: of {self._most_classes} classes that were generated {classes} are left "
                f"(hardly any {', '.join(missing)}): mode collapse. An earlier checkpoint, a smaller learning rate or "
                "another seed usually helps"
            )
        self._most_classes = max(self._most_classes, classes)

    # Pictures

    def predict_step(self, batch: tuple[Tensor, Tensor] | Tensor, batch_idx: int) -> list[dict[str, Any]]:
        """Generate as many pictures as the batch has, which is not looked at.

        For each its ``place``, the seed of its code; ``class_name``, what was asked for, of a conditional model; and
        with a classifier ``seen_as`` and the ``probability`` of that.
        """
        self._seen = 0 if batch_idx == 0 else self._seen
        places = self._places(len(batch if isinstance(batch, Tensor) else batch[0]))
        labels = self._turns(places)
        rows: list[dict[str, Any]] = [{"place": place} for place in places]
        for row, label in zip(rows, labels.tolist() if labels is not None else [], strict=False):
            row["class_name"] = self.class_names[label]
        if self._judge and rows:
            _, probabilities = see(self._judge[0], self.decode(self._codes_at(places), labels))
            for row, probability, seen in zip(rows, *(part.tolist() for part in probabilities.max(1)), strict=True):
                row |= {"seen_as": self._judge[0].class_names[seen], "probability": probability}
        return rows

    def draw_predictions(self, batch: Any, predictions: list[dict[str, Any]]) -> Any:
        """A contact sheet of the first 32 generated pictures with what the classifier sees."""
        places = range(min(32, len(predictions)))
        return self._captioned(self._codes_at(places), self._turns(places))

    def on_predict_end(self) -> None:
        """Show what lies between codes, beside the predictions."""
        if self.trainer.is_global_zero and self.trainer.loggers:
            self._show_codes("predict")

    def _turns(self, places: range) -> Tensor | None:
        """The classes in turn over all places, whichever process has them."""
        return None if self.classes is None else torch.tensor(places, device=self.device) % self.classes

    def _show_samples(self) -> None:
        """The pictures of the first codes, and in a fit how they have changed over the epochs."""
        columns = self.classes or 8
        count = columns * 8
        images = self.decode(self._codes_at(range(count)))
        log_picture(self, "val/samples", tiles_figure(images, columns, f"samples, epoch {self.current_epoch}"))
        if self.trainer.state.fn == "fit":
            self._animate(tiles(images, columns))

    def _animate(self, sheet: np.ndarray) -> None:
        """Show a sheet of samples (height, width, 3) after some of those before."""
        self._frames[self._sheets] = sheet
        self._sheets += 1
        log_animation(self, "val/samples_over_training", list(self._frames.values()))
        self._frames = {place: frame for place, frame in self._frames.items() if place in kept(self._sheets)}

    def _show_codes(self, stage: str) -> None:
        """Interpolation between codes, and with a classifier sums of them."""
        log_picture(self, f"{stage}/interpolation", tiles_figure(self._interpolated(), STEPS, "between two codes"))
        if self._judge and self.classes is None and (found := self._sums()) is not None:
            images, rows = found
            log_picture(self, f"{stage}/latent_arithmetic", tiles_figure(images, ALIKE + 1, "codes; their mean", rows))

    def _interpolated(self) -> Tensor:
        """12 rows of 12 pictures (144, C, H, W), each row from one code to another, of one class if any."""
        ends = self._codes_at(range(2 * STEPS)).view(STEPS, 2, 1, self.code_size)
        share = torch.linspace(0, 1, STEPS, device=self.device)[:, None]
        codes = ends[:, 0] * (1 - share) + ends[:, 1] * share  # (rows, steps, code_size)
        rows = torch.arange(STEPS, device=self.device).repeat_interleave(STEPS)
        return self.decode(codes.flatten(0, 1), rows % self.classes if self.classes else None)

    def _sums(self) -> tuple[Tensor, list[str]] | None:
        """Rows of three pictures of a class and that of their codes' mean z̄, for three classes; last z̄₁ - z̄₂ + z̄₃.

        None where fewer than three classes are found. The last row repeats the three means before the sum.
        """
        codes = self._codes_at(range(500))
        seen = see(self._judge[0], self.decode(codes))[1].max(1)
        names = self._judge[0].class_names
        order = seen.values.argsort(descending=True)
        members = {k: order[seen.indices[order] == k][:ALIKE] for k in range(len(names))}
        chosen = [k for k, places in members.items() if len(places) == ALIKE][:3]
        if len(chosen) < 3:
            return None
        means = [codes[members[k]].mean(0) for k in chosen]
        rows = [torch.cat([codes[members[k]], mean[None]]) for k, mean in zip(chosen, means, strict=True)]
        rows.append(torch.stack([*means, means[0] - means[1] + means[2]]))
        a, b, c = (names[k] for k in chosen)
        return self.decode(torch.cat(rows)), [a, b, c, f"{a} - {b} + {c}"]

    def _captioned(self, codes: Tensor, labels: Tensor | None) -> Any:
        images = self.decode(codes, labels)
        if not self._judge:
            asked = [self.class_names[k] for k in labels.tolist()] if labels is not None else [""] * len(images)
            return contact_sheet(images, asked, "samples")
        values, classes = (part.tolist() for part in see(self._judge[0], images)[1].max(1))
        captions = [f"{self._judge[0].class_names[k]} {value:.0%}" for value, k in zip(values, classes, strict=True)]
        wrong = [k != asked for k, asked in zip(classes, labels.tolist(), strict=True)] if labels is not None else None
        return contact_sheet(images, captions, "samples, and what the classifier sees", wrong)

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say in the file what it is; keep the batches that wait for a step, and the number of sheets."""
        checkpoint["zoo"] = describe(self)
        if self._window and self.trainer.world_size == 1:
            checkpoint["waiting_batches"] = self._window
        checkpoint["sheets"] = self._sheets

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the batches that waited for a step, and with the sheets' numbers."""
        self._sheets = checkpoint.get("sheets", 0)
        self._window = [tuple(batch) for batch in checkpoint.get("waiting_batches", [])]
