"""The computations that the kernel benchmarks compare: ours, plain PyTorch with full logits, and other projects'.

Each function takes the inputs and gives a call without arguments that does the work once and returns both gradients.
Peers are imported where they are used, and skip their rows where they are not installed. `check_linear` refuses a
candidate that computes something else before it is timed.
"""

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

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


def cross_entropy_ours(head: Head, objective: str) -> Call:
    """The sampled objective without a teacher, every token's advantage 1."""
    _only(objective, "cross_entropy")
    advantage = torch.ones_like(head.token_weight)

    def call():
        loss, _ = linear_distill_loss(*head.trained, None, None, head.token_ids, head.token_weight, advantage=advantage)
        return torch.autograd.grad(loss, head.trained)

    return call


def rewarded_ours(head: Head, advantage: float | None = 0.5, passes: int = 1) -> Call:
    """The reverse KL and the sampled term of a task's advantage, in one or two passes over the student's logits."""
    task = None if advantage is None else torch.full_like(head.token_weight, advantage)
    of_rows = head.token_ids, head.token_weight

    def call():
        teacher = head.teacher_hidden, head.teacher_weight
        given = {"task_advantage": task if passes == 1 else None}
        loss, _ = linear_distill_loss(*head.trained, *teacher, *of_rows, objective="reverse_kl", **given)
        if passes == 2:
            loss = loss + linear_distill_loss(*head.trained, None, None, *of_rows, advantage=task)[0]
        return torch.autograd.grad(loss, head.trained)

    return call


REWARDED = {
    "ours": rewarded_ours,
    "without a reward": partial(rewarded_ours, advantage=None),
    "a second pass": partial(rewarded_ours, passes=2),
}
BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # where the peers put our objectives on one scale


def linear_pytorch(head: Head, objective: str) -> Call:
    """Full logits of both models, float32 log-softmax (float64 of float64 inputs), autograd."""

    def call():
        wide = torch.promote_types(head.student_hidden.dtype, torch.float32)
        student = F.linear(*head.trained).to(wide).log_softmax(-1)
        if objective == "cross_entropy":
            losses = -student.gather(1, head.token_ids[:, None])[:, 0]
            return torch.autograd.grad((losses * head.token_weight).sum(), head.trained)
        with torch.no_grad():
            teacher = F.linear(head.teacher_hidden, head.teacher_weight).to(wide).log_softmax(-1)
        if objective == "reverse_kl":
            losses = (student.exp() * (student - teacher)).sum(-1)
        elif objective == "forward_kl":
            losses = (teacher.exp() * (teacher - student)).sum(-1)
        elif objective == "jsd":
            mixture = torch.logaddexp(student, teacher) - math.log(2)
            to_teacher = teacher.exp() * (teacher - mixture)
            losses = ((student.exp() * (student - mixture) + to_teacher) / 2).sum(-1)
        else:
            chosen = student.gather(1, head.token_ids[:, None])[:, 0]
            reward = teacher.gather(1, head.token_ids[:, None])[:, 0] - chosen.detach()
            losses = -reward * chosen
        return torch.autograd.grad((losses * head.token_weight).sum(), head.trained)

    return call


def linear_trl(head: Head, objective: str) -> Call:
    """TRL's ChunkedDivergence."""
    _only(objective, *BETA)
    module = peer("trl.kernels.chunked_divergence")

    def call():
        divergence, _ = module.ChunkedDivergenceFunction.apply(
            *head.trained, None, head.teacher_hidden, head.teacher_weight, None, BETA[objective]
        )
        return torch.autograd.grad((divergence * head.token_weight).sum(), head.trained)

    return call


def linear_liger(head: Head, objective: str) -> Call:
    """Liger's fused linear JSD: the Triton one on CUDA, the chunked one on a CPU."""
    _only(objective, *BETA)
    beta = BETA[objective]
    if head.student_hidden.is_cuda:
        fused = peer("liger_kernel.transformers.fused_linear_jsd").LigerFusedLinearJSD(jsd_beta=beta)
        labels = None
    else:
        module = peer("liger_kernel.chunked_loss.jsd_loss")
        fused = module.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
        labels = head.token_ids

    def call():
        loss = fused(*head.trained, head.teacher_hidden, head.teacher_weight, labels)
        return torch.autograd.grad(loss, head.trained)

    return call


def cross_entropy_cce(head: Head, objective: str) -> Call:
    """Cut cross-entropy: its Triton kernel on CUDA, its compiled form on a CPU."""
    _only(objective, "cross_entropy")
    module = peer("cut_cross_entropy")
    impl = "cce" if head.student_hidden.is_cuda else "torch_compile"

    def call():
        losses = module.linear_cross_entropy(*head.trained, head.token_ids, reduction="none", impl=impl)
        return torch.autograd.grad((losses * head.token_weight).sum(), head.trained)

    return call


def cross_entropy_torch(head: Head, objective: str) -> Call:
    """PyTorch's own fused form, in chunks as it chooses them; it has equal weights only, as these inputs have."""
    _only(objective, "cross_entropy")
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip(f"torch {torch.__version__} has none")
    options = torch.nn.LinearCrossEntropyOptions()

    def call():
        loss = F.linear_cross_entropy(*head.trained, head.token_ids, options=options)
        return torch.autograd.grad(loss, head.trained)

    return call


def cross_entropy_liger(head: Head, objective: str) -> Call:
    _only(objective, "cross_entropy")
    if not head.student_hidden.is_cuda:
        pytest.skip("has no CPU path")
    fused = peer("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()

    def call():
        loss = fused(head.student_weight, head.student_hidden, head.token_ids)
        return torch.autograd.grad(loss, head.trained)

    return call


def peer(module: str):
    """Another project's module; skips where it cannot be imported, saying why and how it could be."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"not installed ({error}): pip install '.[peers]' brings {module.split('.')[0]}")


def _only(objective: str, *supported: str) -> None:
    if objective not in supported:
        pytest.skip(f"has {' and '.join(supported)} only")


def check_linear(
    candidate: Callable[[Head, str], Call],
    objective: str,
    V: int,
    Hs: int,
    Ht: int,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Runs a candidate on a few tokens and compares its gradients with PyTorch's in float64.

    Asserts an error of at most ten times that of PyTorch with full logits in the same dtype, plus 1 in 10,000: less
    exact than that is another loss.
    """
    few = make_head(16, V, Hs, Ht, device, dtype)
    truth = exact_gradients(few, objective)
    found = relative_error(candidate(few, objective)(), truth)
    allowed = 10 * relative_error(linear_pytorch(few, objective)(), truth) + 1e-4
    assert found <= allowed, f"computes something else: relative error {found:.2e} of the gradients"


def exact_gradients(head: Head, objective: str) -> tuple[Tensor, ...]:
    """Both, by PyTorch in float64."""
    exact = Head(*(t.detach().double() if t.is_floating_point() else t for t in vars(head).values()))
    for tensor in exact.trained:
        tensor.requires_grad_()
    return linear_pytorch(exact, objective)()


def relative_error(gradients: Iterable[Tensor], truth: Iterable[Tensor]) -> float:
    """The largest of any."""
    pairs = zip(gradients, truth, strict=True)
    return max(((found.double() - right).norm() / right.norm()).item() for found, right in pairs)


def close_head(V: int, H: int, device: torch.device) -> Head:
    """In bfloat16, with a teacher some 5e-4 nats away: the student's weight, and hidden states 3 % off."""
    head = make_head(64, V, H, H, device, torch.bfloat16)
    hidden = head.student_hidden.detach()
    head.teacher_weight = head.student_weight.detach()
    head.teacher_hidden = (hidden.float() + 0.03 * head.teacher_hidden.float()).bfloat16()
    return head


LINEAR = {"ours": linear_ours, "pytorch": linear_pytorch, "trl": linear_trl, "liger": linear_liger}
CROSS_ENTROPY = {
    "ours": cross_entropy_ours,
    "pytorch": linear_pytorch,
    "torch, fused": cross_entropy_torch,
    "cce": cross_entropy_cce,
    "liger": cross_entropy_liger,
}
OBJECTIVES = ("reverse_kl", "sampled_reverse_kl", "forward_kl", "jsd")


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
