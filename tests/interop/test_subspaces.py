"""AdaMSS beside the table of cases: its k-means against scikit-learn's, and where peft fails."""

import numpy as np
import pytest
import torch
from torch import nn

import minipeft
from minipeft.methods.adamss.subspaces import k_means

from . import bases as B
from . import harness as H


def left_vectors(n, d, seed, repeated=False):
    """d orthonormal columns of length n in float32; with `repeated` half of the rows are alike, as unused ones are."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(n, 2 * d))
    if repeated:
        W[rng.permutation(n)[: n // 2]] = W[0]
    return np.linalg.svd(W, full_matrices=False)[0][:, :d].astype(np.float32)


@pytest.mark.parametrize("repeated", [False, True], ids=["all rows differ", "rows repeated"])
@pytest.mark.parametrize("n, d, k", [(6, 2, 1), (8, 3, 3), (9, 4, 5), (40, 7, 5), (60, 30, 12), (700, 40, 10)])
def test_the_clusters_of_scikit_learn(n, d, k, repeated):
    cluster = pytest.importorskip("sklearn.cluster")
    for seed in range(8):
        X = left_vectors(n, d, seed, repeated)
        kmeans = cluster.KMeans(k, init="random", n_init=1, max_iter=10, random_state=123456789)
        assert np.array_equal(k_means(X, k), kmeans.fit_predict(X))


def broken(lib):
    """A layer whose adapter gives finite weights and a bias that is not."""
    model = lib.get_peft_model(B.MLP.build(), lib.AdamssConfig(target_modules=["wide"], r=3, init_weights=None))
    model.base_model.model.wide.adamss_newB["default"][:, -1] = float("nan")
    return model


def test_safe_merge_that_fails_changes_nothing(lib, ref, is_ref):
    """https://github.com/huggingface/peft/issues/3710: peft writes the weight before it looks at the bias."""
    theirs = broken(ref)
    before = H.snapshot(theirs)
    with pytest.raises(ValueError):
        theirs.merge_adapter(safe_merge=True)
    weight = "base_model.model.wide.base_layer.weight"
    assert not torch.equal(theirs.state_dict()[weight], before[weight]), "peft keeps the law here: strike this entry"
    assert not theirs.base_model.model.wide.merged_adapters
    if not is_ref:
        ours = broken(lib)
        before = H.snapshot(ours)
        with pytest.raises(ValueError):
            ours.merge_adapter(safe_merge=True)
        H.identical(H.snapshot(ours), before)


def test_rank_above_that_of_the_decomposition(lib, ref, is_ref):
    """peft makes A and B of ranks that do not fit; here s is at most r."""
    given = {"target_modules": ["wide"], "r": 1, "subspace_rank": 2, "num_subspaces": 2}
    batch = H.inputs(CASE, torch.float32)
    with pytest.raises(RuntimeError):
        H.run(ref.get_peft_model(B.MLP.build(), ref.AdamssConfig(**given)), batch)
    if not is_ref:
        model = H.move(lib.get_peft_model(B.MLP.build(), lib.AdamssConfig(**given)))
        running = H.run(model, batch)
        H.close(H.run(model.merge_and_unload(), batch), running, 1e-5)


def test_rows_without_weights(lib, is_ref):
    """Fewer different rows than subspaces: peft fails, here there are as many subspaces as it takes."""
    base = nn.Sequential(nn.Linear(6, 8, bias=False))
    base[0].weight.data[2:] = 0.0
    if is_ref:
        pytest.skip("a promise of the module under test")
    model = lib.get_peft_model(base, lib.AdamssConfig(target_modules=["0"], r=4, init_weights=None))
    assert 0 < model.base_model.model[0].num_subspaces["default"] <= 5
    x = torch.randn(3, 6)
    running = model(x)
    assert torch.allclose(model.merge_and_unload()(x), running, atol=1e-6)


def test_weights_that_are_not_there():
    with torch.device("meta"):
        base = nn.Sequential(nn.Linear(6, 8))
    with pytest.raises(minipeft.UnsupportedFeatureError, match="not loaded"):
        minipeft.get_peft_model(base, minipeft.AdamssConfig(target_modules=["0"]))


def test_a_second_adapter_has_a_budget_of_its_own(lib, ref, is_ref):
    """peft takes the number of subspaces of the first adapter for that of the second."""
    frozen = {}
    for module in (ref, lib):
        H.seed(0)
        given = {"target_modules": ["square", "wide"], "r": 4, "init_weights": None, "use_asa": True}
        given |= {"init_warmup": 0, "final_warmup": 8, "mask_interval": 4, "asa_target_subspaces": 2}
        model = module.get_peft_model(B.MLP.build(), module.AdamssConfig(num_subspaces=2, **given))
        model.add_adapter("other", module.AdamssConfig(num_subspaces=6, asa_schedule_exponent=1.0, **given))
        model.set_adapter("other")
        for step in range(5):
            model.zero_grad()
            H.tensors(H.call(model, H.inputs(CASE, torch.float32)))["output"].square().sum().backward()
            model.base_model.update_and_allocate(step)
        frozen[module.__name__] = sum(not p.requires_grad for n, p in model.named_parameters() if ".other" in n) // 2
    # half-way from 12 to 2 that is 7, from the first adapter's 4 it is 3, and one fewer is kept
    assert frozen["peft"] > frozen[lib.__name__] or is_ref
    assert is_ref or frozen[lib.__name__] >= 12 - 7


CASE = type("Case", (), {"base": B.MLP, "inputs": {}})
