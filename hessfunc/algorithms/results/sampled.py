"""Estimate of a number from random batches, with the two sources of its noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hessfunc.algorithms.results.estimate import Estimate
from hessfunc.options import validated

# Cost of the graph of a batch's gradient, in products: the graph takes 2 to 3 gradients, a product
# with it 2.
_COST_OF_A_BATCH = 1.25


@dataclass(frozen=True, kw_only=True, repr=False)
class SampledEstimate(Estimate):
    """Estimate from m random batches with r probes on each.

    Its ``samples`` are the means of the batches. The variance of the value is
    ``correction * variance_data / m + variance_probes / (m r)``. The standard error is infinite if
    all samples agree to rounding and some batches were not drawn, since the noise is then unknown.

    Attributes:
        variance_probes: Variance of one probe within a batch; NaN if it is unknown, because each
            batch had a single probe.
        variance_data: Estimated variance of the trace between batches, without the noise of the
            probes; 0 if the probes explain the differences of the batches, and NaN if it is
            unknown, because each batch had a single probe.
        draws: Number m of draws.
        probes_per_draw: Number r of probes on each draw.
        population: Number of batches, if they are drawn without replacement and their number is
            known, else None.
        correction: Finite population correction: 1 with replacement, 0 after whole passes.
        draws_seed: Seed of the draws, or None if it is unknown.
    """

    variance_probes: float
    variance_data: float
    draws: int
    probes_per_draw: int
    population: int | None = None
    correction: float = 1.0
    draws_seed: int | None = None

    def _headline(self) -> dict[str, object]:
        draws = f"{self.draws}"
        if self.population is not None and not self.every_batch_was_drawn:
            draws = f"{self.draws} of {self.population}"
        return {**super()._headline(), "draws": draws, "data_share": f"{self.data_share:.2g}"}

    @property
    def data_share(self) -> float:
        """Share of the value's variance that only more batches reduce, in [0, 1] or NaN."""
        data = self.correction * self.variance_data
        total = data + self.variance_probes / self.probes_per_draw
        return data / total if total else math.nan

    @property
    def every_batch_was_drawn(self) -> bool:
        """Whether the draws include every batch of a known population."""
        return self.population is not None and self.draws >= self.population

    @validated
    def best_probes_per_draw(self, cost: float = _COST_OF_A_BATCH) -> float:
        """Return the number r of probes per draw with the least variance for the same work.

            r = sqrt(cost variance_probes / variance_data)

        Args:
            cost: Cost of a batch before its first product, in units of a product with one vector.
                By default 1.25, the cost of the graph of a gradient for a Hessian.

        Returns:
            The number r, infinite if the data have no noise.

        Raises:
            ValueError: If the cost is not positive.
        """
        if not cost > 0:
            raise ValueError(f"cost={cost}: choose a positive number, such as cost=1.25")
        if self.variance_data == 0:
            return math.inf if self.variance_probes > 0 else math.nan
        return math.sqrt(cost * self.variance_probes / self.variance_data)

    @property
    def advice(self) -> str:
        """Advice on how to narrow the interval for the least work."""
        if math.isnan(self.variance_data):
            return (
                "With one probe per draw, the noise of the data cannot be separated from that of "
                "the probes: take 2 probes per draw."
            )
        if self.every_batch_was_drawn and self.correction == 0:
            if self.variance_probes == 0:
                return f"All {self.population} batches were drawn, and the probes agree: exact."
            return (
                f"All {self.population} batches were drawn: take more probes per draw, or another "
                "pass."
            )
        unknown = math.isinf(self.stderr) and not self.every_batch_was_drawn
        if unknown or math.isnan(self.data_share):
            return f"The batches drawn agree, and so do the probes. {self._unseen}"
        shares = (
            f"Of the variance, {self.data_share:.0%} comes from the data and "
            f"{1 - self.data_share:.0%} from the probes: "
        )
        return shares + self._better_draws + self._all_at_once

    @property
    def _better_draws(self) -> str:
        """Advice on draws and probes per draw."""
        best = self.best_probes_per_draw()
        if math.isinf(best):
            return "take more probes per draw, which cost less than more draws."
        wanted = max(1, round(best))
        if wanted > self.probes_per_draw:
            return f"take more probes per draw; about {wanted} are best."
        if wanted < self.probes_per_draw:
            return f"take more draws, with fewer probes each; about {wanted} is best."
        return f"take more draws; the number of probes per draw, {wanted}, is the best."

    @property
    def _all_at_once(self) -> str:
        """Advice to multiply all batches by each probe, if probes contribute the larger noise."""
        if self.population is None or self.data_share > 0.5:
            return ""
        return (
            " If the batches are alike, a probe of all of them varies far less: compare with "
            "`hutchinson(draws.full, like)`."
        )

    @property
    def _unseen(self) -> str:
        """Advice on batches that were not drawn."""
        if self.population is None:
            return (
                "Batches that were not drawn can differ: draw all of them, with "
                "`draws(..., replace=False)`."
            )
        budget = self.population * self.probes_per_draw
        return (
            f"The {max(0, self.population - self.draws)} batches that were not drawn can differ: "
            f"draw all {self.population}, with max_matvecs={budget}."
        )
