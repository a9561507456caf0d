"""The gradient of each sample of a batch, from one backward pass of the ordinary scalar loss.

A loss that is the mean of the losses of its samples has one backward pass, and everything that the gradient of each
sample is made of passes through it: what went into an operation with a parameter, and the gradient of what came out.
Both are kept, parameter by parameter; the norms of the samples' gradients and any weighted sum of them follow without
the gradients themselves, which would take a copy of the model for each sample (Bu et al., Book-keeping, 2023).

It is operations that are watched, not layers: a weight that is used twice, a bare parameter, a functional call or a
parametrisation is as good as an ``nn.Linear``. ``paths`` learns from two small batches along which axis of each
operand samples lie; ``recording`` keeps the operands; ``pieces`` holds the formulas of the common operations and
``generic`` the one that serves the rest; ``check`` compares with samples evaluated one by one.
"""

from lightrail.sample_gradients.check import learn, refuse_unseen
from lightrail.sample_gradients.gradients import SampleGradients
from lightrail.sample_gradients.one_by_one import gradients_one_by_one
from lightrail.sample_gradients.paths import Path
from lightrail.sample_gradients.recording import Recording

__all__ = ["Path", "Recording", "SampleGradients", "gradients_one_by_one", "learn", "refuse_unseen"]
