from typing import Any

import pytest
import torch

import hessfunc as hf
from tests.cases import case

FOUND = case("mlp")


@pytest.mark.parametrize("given", [FOUND.loss, hf.hvp(FOUND.loss)], ids=["loss", "curvature"])
@pytest.mark.parametrize("algorithm", [hf.lanczos, hf.xtrace, hf.slq])
def test_what_takes_params_and_batch_is_no_matvec(given: Any, algorithm: Any) -> None:
    with pytest.raises(TypeError, match=r"not a matvec: pass `hvp\(loss\)\(params, batch\)`"):
        algorithm(given, FOUND.params, seed=0)


def test_a_type_error_within_the_matvec_stays_as_it_is() -> None:
    def matvec(block: Any) -> Any:
        return block + "one"

    with pytest.raises(TypeError, match="unsupported operand"):
        hf.lanczos(matvec, torch.zeros(3), k=1, seed=0)
