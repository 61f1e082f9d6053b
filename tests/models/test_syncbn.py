"""Two workers with parts of a batch, of differing sizes, compute what one process computes with the whole."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from models import syncbn

BATCH, STEPS = 6, 2
PARTS = (slice(0, 4), slice(4, 6))


def network():
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 5, 3),
        nn.BatchNorm2d(5, affine=False, momentum=None),
        nn.Sequential(nn.BatchNorm2d(5, track_running_stats=False)),
    )
    nn.init.normal_(layers[1].weight)
    nn.init.normal_(layers[1].bias)
    return layers


def batches():
    # A mean far from zero: a variance taken as E[x²] - E[x]² would be wrong here.
    return torch.randn(STEPS, BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3 + 40


def train(model, inputs):
    """Outputs and input gradients of every step (batch first), the summed parameter gradients, the final state."""
    steps = []
    for x in inputs:
        x = x.clone().requires_grad_()
        y = model(x)
        (y.sin() * y).sum().backward()
        steps.append((y.detach(), x.grad))
    model.eval()
    outputs, gradients = (torch.stack(parts, dim=1) for parts in zip(*steps, strict=True))
    return {
        "outputs": outputs,
        "gradients": gradients,
        "evaluation": model(inputs[0]).detach(),
        "parameters": [parameter.grad for parameter in model.parameters()],
        "state": dict(model.state_dict()),
    }


def half_precision(layer, x):
    x = x.bfloat16().requires_grad_()
    y = layer(x)
    (y.sin() * y).sum().backward()
    return torch.stack([y.detach(), x.grad], dim=1), layer.running_mean, layer.running_var


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    inputs = batches()[:, PARTS[rank]]
    result = train(syncbn.convert(network()), inputs)
    result["rough"] = half_precision(syncbn.convert(nn.BatchNorm2d(3)), inputs[0])
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    torch.multiprocessing.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("what", ["outputs", "gradients"])
def test_two_parts_equal_the_whole(parts, what):
    whole = train(network(), batches())
    torch.testing.assert_close(torch.cat([part[what] for part in parts]), whole[what], rtol=1e-4, atol=1e-5)


def test_running_statistics_and_parameter_gradients_equal_those_of_the_whole(parts):
    whole = train(network(), batches())
    for part in parts:
        assert part["state"].keys() == whole["state"].keys()
        for key, tensor in whole["state"].items():
            torch.testing.assert_close(part["state"][key], tensor, rtol=1e-5, atol=1e-5)
    for index, gradient in enumerate(whole["parameters"]):
        summed = parts[0]["parameters"][index] + parts[1]["parameters"][index]
        torch.testing.assert_close(summed, gradient, rtol=1e-4, atol=1e-3)


def test_bfloat16_activations_keep_float32_statistics(parts):
    whole, *statistics = half_precision(nn.BatchNorm2d(3), batches()[0])
    joined = torch.cat([part["rough"][0] for part in parts])
    assert joined.dtype == torch.bfloat16
    torch.testing.assert_close(joined, whole, rtol=0.05, atol=0.05)
    for part in parts:
        torch.testing.assert_close(list(part["rough"][1:]), statistics)


def test_alone_it_is_the_ordinary_layer_with_the_same_parameters():
    plain, converted = network(), network()
    before = list(converted.parameters())
    assert syncbn.convert(converted) is converted
    assert all(a is b for a, b in zip(before, converted.parameters(), strict=True))
    assert [type(m) for m in converted.modules()].count(syncbn.GlobalBatchNorm2d) == 3
    expected, result = train(plain, batches()), train(syncbn.convert(converted), batches())
    assert torch.equal(expected["outputs"], result["outputs"])
    assert torch.equal(expected["gradients"], result["gradients"])
    assert list(expected["state"]) == list(result["state"])


def test_subclasses_are_refused_rather_than_left_local():
    class Fused(nn.BatchNorm2d):
        pass

    with pytest.raises(ValueError, match="Fused"):
        syncbn.convert(nn.Sequential(Fused(3)))
