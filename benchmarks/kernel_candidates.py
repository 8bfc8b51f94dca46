"""The computations that the kernel benchmarks compare: ours, plain PyTorch with full logits, and other projects'.

Each function takes the inputs and gives a call without arguments that does the work once and returns both gradients.
Peers are imported where they are used, and skip their rows where they are not installed. `check_linear` refuses a
candidate that computes something else before it is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distill_kernels import linear_distill_loss, reverse_kl, sample

Call = Callable[[], object]


@dataclass
class Head:
    """Inputs of a distillation loss: hidden states, head weights, tokens and their weights."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    token_ids: Tensor
    token_weight: Tensor

    @property
    def trained(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden, self.student_weight


def make_head(K: int, V: int, Hs: int, Ht: int, device: torch.device, dtype: torch.dtype) -> Head:
    """Random inputs with logits of one nat in size."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * scale).to(dtype)

    return Head(
        normal(K, Hs).requires_grad_(),
        normal(V, Hs, scale=Hs**-0.5).requires_grad_(),
        normal(K, Ht),
        normal(V, Ht, scale=Ht**-0.5),
        torch.randint(V, (K,), device=device, generator=generator),
        torch.full((K,), 1 / K, device=device),
    )


def linear_ours(head: Head, objective: str) -> Call:
    def call():
        loss, _ = linear_distill_loss(
            *head.trained,
            head.teacher_hidden,
            head.teacher_weight,
            head.token_ids,
            head.token_weight,
            objective=objective,
        )
        return torch.autograd.grad(loss, head.trained)

    return call


def linear_pytorch(head: Head, objective: str) -> Call:
    """Full logits of both models, float32 log-softmax (float64 of float64 inputs), autograd."""

    def call():
        wide = torch.promote_types(head.student_hidden.dtype, torch.float32)
        student = F.linear(*head.trained).to(wide).log_softmax(-1)
        with torch.no_grad():
            teacher = F.linear(head.teacher_hidden, head.teacher_weight).to(wide).log_softmax(-1)
        if objective == "reverse_kl":
            losses = (student.exp() * (student - teacher)).sum(-1)
        else:
            chosen = student.gather(1, head.token_ids[:, None])[:, 0]
            reward = teacher.gather(1, head.token_ids[:, None])[:, 0] - chosen.detach()
            losses = -reward * chosen
        return torch.autograd.grad((losses * head.token_weight).sum(), head.trained)

    return call


def linear_trl(head: Head, objective: str) -> Call:
    """TRL's ChunkedDivergence at beta 1, its reverse KL."""
    _only(objective, "reverse_kl")
    module = pytest.importorskip("trl.kernels.chunked_divergence")

    def call():
        divergence, _ = module.ChunkedDivergenceFunction.apply(
            *head.trained, None, head.teacher_hidden, head.teacher_weight, None, 1.0
        )
        return torch.autograd.grad((divergence * head.token_weight).sum(), head.trained)

    return call


def linear_liger(head: Head, objective: str) -> Call:
    """Liger's fused linear JSD at beta 1, its reverse KL: the Triton one on CUDA, the chunked one on a CPU."""
    _only(objective, "reverse_kl")
    if head.student_hidden.is_cuda:
        fused = pytest.importorskip("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(jsd_beta=1.0)
        labels = None
    else:
        module = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss")
        fused = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
        labels = head.token_ids

    def call():
        loss = fused(*head.trained, head.teacher_hidden, head.teacher_weight, labels)
        return torch.autograd.grad(loss, head.trained)

    return call


def linear_cce(head: Head, objective: str) -> Call:
    """Cut cross-entropy: the student's half of the sampled objective, without a teacher. CUDA only."""
    _only(objective, "sampled_reverse_kl")
    if not head.student_hidden.is_cuda:
        pytest.skip("cut cross-entropy has no CPU path")
    module = pytest.importorskip("cut_cross_entropy")

    def call():
        losses = module.linear_cross_entropy(*head.trained, head.token_ids, reduction="none")
        return torch.autograd.grad((losses * head.token_weight).sum(), head.trained)

    return call


def _only(objective: str, supported: str) -> None:
    if objective != supported:
        pytest.skip(f"has {supported} only")


def check_linear(name: str, objective: str, V: int, Hs: int, Ht: int, device: torch.device, dtype: torch.dtype) -> None:
    """Runs a candidate on a few tokens and compares its gradients with PyTorch's in float64.

    Asserts an error of at most ten times that of PyTorch with full logits in the same dtype, plus 1 in 10,000: less
    exact than that is another loss.
    """
    if name == "cce":  # another loss: there is nothing to compare
        return
    few = make_head(16, V, Hs, Ht, device, dtype)
    exact = Head(*(t.detach().double() if t.is_floating_point() else t for t in vars(few).values()))
    for tensor in exact.trained:
        tensor.requires_grad_()
    truth = linear_pytorch(exact, objective)()

    def error(gradients) -> float:
        pairs = zip(gradients, truth, strict=True)
        return max(((found.double() - right).norm() / right.norm()).item() for found, right in pairs)

    found, allowed = error(LINEAR[name](few, objective)()), 10 * error(linear_pytorch(few, objective)()) + 1e-4
    assert found <= allowed, f"{name} computes something else: relative error {found:.2e} of the gradients"


LINEAR = {
    "ours": linear_ours,
    "pytorch": linear_pytorch,
    "trl": linear_trl,
    "liger": linear_liger,
    "cce": linear_cce,
}


def logits_ours(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Call:
    def call():
        stats = reverse_kl(student, teacher, token_ids)
        return torch.autograd.grad(stats.reverse_kl.sum(), student)

    return call


def logits_pytorch(student: Tensor, teacher: Tensor, token_ids: Tensor) -> Call:
    def call():
        p, q = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        return torch.autograd.grad((p.exp() * (p - q)).sum(), student)

    return call


LOGITS = {"ours": logits_ours, "pytorch": logits_pytorch}


def sample_ours(logits: Tensor, top_p: float) -> Call:
    return lambda: sample(logits, top_p=top_p, seed=0, step=0)


def sample_sorting(logits: Tensor, top_p: float) -> Call:
    """transformers' warper, which sorts, and a multinomial draw; both log-probabilities as in ours."""
    warp = pytest.importorskip("transformers").TopPLogitsWarper(top_p)

    def call():
        scores = warp(None, logits.float()) if top_p < 1 else logits.float()
        chosen = torch.multinomial(scores.softmax(-1), 1)
        return chosen, logits.float().log_softmax(-1).gather(1, chosen), scores.log_softmax(-1).gather(1, chosen)

    return call


SAMPLE = {"ours": sample_ours, "sorting": sample_sorting}
