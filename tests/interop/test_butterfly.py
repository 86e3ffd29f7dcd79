"""BOFT with more than one butterfly factor. peft has them only with its CUDA kernel, which a few lines stand in for."""

import pytest
import torch

from . import bases as B
from . import harness as H
from .cases.case import Case

LINEARS = ["square", "wide"]
CASES = [
    Case("boft/butterfly/two", "BOFTConfig", {"target_modules": LINEARS, "boft_block_size": 2,
                                             "boft_n_butterfly_factor": 2}, B.MLP),
    Case("boft/butterfly/three", "BOFTConfig", {"target_modules": LINEARS, "boft_block_size": 2,
                                               "boft_n_butterfly_factor": 3}, B.MLP),
    Case("boft/butterfly/large_blocks", "BOFTConfig", {"target_modules": LINEARS, "boft_block_size": 4,
                                                      "boft_n_butterfly_factor": 2}, B.MLP_2D),
    Case("boft/butterfly/by_number", "BOFTConfig", {"target_modules": LINEARS, "boft_block_size": 0,
                                                   "boft_block_num": 4, "boft_n_butterfly_factor": 3}, B.MLP),
    Case("boft/butterfly/dropout", "BOFTConfig", {"target_modules": LINEARS, "boft_block_size": 2, "boft_dropout": 0.6,
                                                 "boft_n_butterfly_factor": 3}, B.MLP),
    Case("boft/butterfly/conv2d", "BOFTConfig", {"target_modules": ["first"], "boft_block_size": 2,
                                                "boft_n_butterfly_factor": 2}, B.CONV2D),
]
each_case = pytest.mark.parametrize("case", CASES, ids=[c.id for c in CASES])


class Kernel:
    """What peft's extension computes: blocks (m, d, b, b) put on the diagonal of (m, d b, d b), and back."""

    @staticmethod
    def forward(blocks):
        return [torch.stack([torch.block_diag(*factor) for factor in blocks])]

    @staticmethod
    def backward(grad, blocks):
        b = blocks.shape[-1]
        pieces = [[g[i : i + b, i : i + b] for i in range(0, g.shape[0], b)] for g in grad]
        return [torch.stack([torch.stack(row) for row in pieces])]


@pytest.fixture(autouse=True)
def kernel(monkeypatch, ref):
    from peft.tuners.boft import layer

    monkeypatch.setattr(layer, "_FBD_CUDA", Kernel)


@each_case
def test_output_and_gradients(case, lib, ref):
    theirs, ours = H.pair(ref, lib, case, torch.float64)
    batch = H.inputs(case, torch.float64)
    H.close(H.run(ours, batch), H.run(theirs, batch), 1e-10)
    H.close(H.gradients(ours, batch), H.gradients(theirs, batch), 1e-9)


@each_case
def test_merge(case, lib, ref):
    theirs, ours = H.pair(ref, lib, case, torch.float64)
    batch = H.inputs(case, torch.float64)
    running = H.run(ours, batch)
    H.close(ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict(), 1e-10)
    H.close(H.run(H.pair(ref, lib, case, torch.float64)[1].merge_and_unload(), batch), running, 1e-10)


def test_dropout_at_equal_seed(lib, ref):
    case = next(c for c in CASES if c.id.endswith("dropout"))
    theirs, ours = H.pair(ref, lib, case, torch.float64)
    batch, outs = H.inputs(case, torch.float64), []
    for model in (ours.train(), theirs.train()):
        H.seed(5)
        outs.append(H.run(model, batch))
    H.close(*outs, 1e-10)
    assert H.differ(outs[1], H.run(theirs.eval(), batch), 1e-4)


@pytest.mark.parametrize("fields", [{"boft_block_size": 3}, {"boft_block_size": 4, "boft_n_butterfly_factor": 4},
                                    {"boft_block_size": 0, "boft_block_num": 2, "boft_n_butterfly_factor": 3}])
def test_refused(fields, lib, ref):
    for module in (ref, lib):
        config = module.BOFTConfig(target_modules=["wide"], **{"boft_n_butterfly_factor": 2, **fields})
        with pytest.raises(ValueError):
            module.get_peft_model(B.MLP.build(), config)
