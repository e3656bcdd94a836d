"""Tests of the losses with queues and of batch norm over processes in losses.py: each against loops written from its definition, in value
and in gradient, at cosines of every size and in half precision; two processes against one."""
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import losses

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
N, K, MU, GAMMA = 5, 7, 90.0, 0.5


def rows(n, seed, dim=3):
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), dim=1).requires_grad_()


def log_one_plus(exponents):
    """log(1 + sum of e^x), in double precision without any trick."""
    return torch.log(1 + sum((x.exp() for x in exponents), torch.zeros((), dtype=torch.float64)))


def uto(x, y, own):
    s, total = x @ y.t(), 0
    for j in range(len(x)):
        total = total + log_one_plus([MU * (s[i, j] - GAMMA) for i in range(len(x)) if not own[i, j]]) / MU
        total = total + log_one_plus([MU * (s[j, i] - GAMMA) for i in range(len(x)) if not own[j, i]]) / MU - torch.log(1 + s[j, j].clamp(min=0))
    return total / len(x)


def infonce(x, y, own):
    s, total = x @ y.t() / 0.05, 0
    for j in range(len(x)):
        for row in (s[j], s[:, j]):
            total = total + log_one_plus([row[i] - row[j] for i in range(len(x)) if not own[i, j]]) / 2
    return total / len(x)


def triplet(x, y, own, margin=0.2):
    s, total = x @ y.t(), 0
    for j in range(len(x)):
        for row in (s[j], s[:, j]):
            total = total + max([(margin + row[i] - row[j]).clamp(min=0) for i in range(len(x)) if not own[i, j]], default=0)
    return total / len(x)


def of_queue(one):
    return lambda q, k, queue, own: sum(one((q[i] * k[i]).sum(), [(q[i] * queue[j]).sum() for j in range(len(queue)) if not own[i, j]]) for i in range(len(q))) / len(q)


QUEUE = {losses.uto_queue_loss: of_queue(lambda p, negatives: log_one_plus([MU * (n - GAMMA) for n in negatives]) / MU - torch.log(1 + p.clamp(min=0))),
         losses.info_nce_queue_loss: of_queue(lambda p, negatives: log_one_plus([(n - p) / 0.05 for n in negatives])),
         losses.hardest_triplet_queue_loss: of_queue(lambda p, negatives: (0.2 + max(negatives) - p).clamp(min=0) if negatives else 0 * p)}


def agree(found, expected, inputs):
    assert torch.allclose(found.double(), expected, atol=1e-5)
    for a, b in zip(torch.autograd.grad(found, inputs, retain_graph=True), torch.autograd.grad(expected, inputs)):
        assert torch.allclose(a.double(), b, atol=1e-4) and b.abs().max() > 1e-3


@pytest.mark.parametrize("found, expected", [(losses.uto_loss, uto), (losses.info_nce_loss, infonce), (losses.hardest_triplet_loss, triplet)])
@pytest.mark.parametrize("things", [[0, 1, 2, 3, 4], [0, 1, 0, 3, 0]])
def test_batch_losses(found, expected, things):
    own = torch.tensor([[a == b for b in things] for a in things])
    for seed in range(3):
        x, y = rows(N, seed), rows(N, seed + 10)
        agree(found(x, y, own), expected(x, y, own), (x, y))


@pytest.mark.parametrize("found", QUEUE)
def test_queue_losses_leave_a_querys_own_keys_out(found):
    q, k, queue = rows(N, 0), rows(N, 1).detach(), rows(K, 2).detach()
    own = torch.zeros(N, K, dtype=torch.bool)
    own[0, 3] = own[2, 0] = own[2, 6] = True
    own[4] = True  # nothing but its own keys
    agree(found(q, k, queue, own), QUEUE[found](q, k, queue, own), (q,))
    changed = queue.clone()
    changed[3] = -changed[3]
    each = lambda x: [found(q[i:i + 1], k[i:i + 1], x, own[i:i + 1]).item() for i in range(N)]
    before, after = each(queue), each(changed)
    assert before[0] == after[0] and before[4] == after[4] and before[1:4] != after[1:4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cosine", [-1.0, 0.0, 1.0])
def test_finite_for_any_cosine_in_any_precision(dtype, cosine):
    """All at one cosine: e^(90 / 2) of each of 4,096 keys would overflow half precision, and single when multiplied."""
    x = F.normalize(torch.ones(4, 8, dtype=dtype), dim=1).requires_grad_()
    y = (x.detach() if cosine else torch.tensor([1.0, -1.0] * 4, dtype=dtype).expand(4, 8) / 8 ** 0.5) * (cosine or 1)
    queue, own = y[:1].expand(4096, 8), torch.zeros(4, 4096, dtype=torch.bool)
    same = torch.eye(4, dtype=torch.bool)
    for loss in (*(f(x, y, same) for f in (losses.uto_loss, losses.info_nce_loss, losses.hardest_triplet_loss)), *(f(x, y, queue, own) for f in QUEUE)):
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, x, retain_graph=True)[0]).all()
    expected = torch.log(torch.tensor(1 + 4096 * 2.718281828 ** (90.0 * (cosine - 0.5)))).item() / 90 - torch.log(torch.tensor(1 + max(0.0, cosine))).item()
    assert losses.uto_queue_loss(x, y, queue, own).item() == pytest.approx(expected, abs=0.02)


WORKERS = '''
import sys
import torch
import torch.distributed as dist
import losses

def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(0)
    norm, x = losses.BatchNorm(3), torch.randn(7, 3) * 2 + 1
    weight = torch.randn(7, 3)
    mine = slice(0, 5) if rank == 0 else slice(5, 7)  # other numbers of rows on each
    own = x[mine].clone().requires_grad_()
    y, _ = losses.gather_rows(norm(own), torch.zeros(len(own), dtype=torch.int64))
    (y * weight).square().sum().backward()  # the whole loss on every process
    losses.average_gradients(norm.parameters())
    torch.save([y.detach(), own.grad / 2, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var, norm.eval()(x).detach()], f"{folder}/{rank}.pt")

if __name__ == "__main__":
    torch.multiprocessing.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
'''


def test_batch_norm_of_two_processes_equals_one(tmp_path):
    (tmp_path / "workers.py").write_text(WORKERS)
    done = subprocess.run([sys.executable, tmp_path / "workers.py", tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    norm, x = torch.nn.BatchNorm1d(3), (torch.randn(7, 3) * 2 + 1).requires_grad_()
    weight = torch.randn(7, 3)
    y = norm(x)
    (y * weight).square().sum().backward()
    zero, one = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for found, grad in ((zero, x.grad[:5]), (one, x.grad[5:])):
        for a, b in zip(found, (y, grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var)):
            assert torch.allclose(a, b, atol=1e-5)
        assert torch.allclose(found[6], norm.eval()(x), atol=1e-5)
        norm.train()
