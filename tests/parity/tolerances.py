"""How far the backends may differ in float32, and what was measured.

Measured in November 2026 on a 2-core x86-64 with torch 2.13.0 and mlx 0.32.4 (CPU, OpenBLAS in front),
over every case of this folder. A tolerance is several times the largest difference measured, so that
other hardware passes, and well below what an error of 1e-3 in one place makes (given for each).
"""

# Largest difference over the largest logit. Measured 1.0e-6; an error of 1e-3: from 4.1e-5.
LOGITS = 1e-5
# The same, for each tensor's gradient. Measured 1.2e-6, with experts 3.0e-6; an error of 1e-3: from 6.3e-5.
GRADIENTS = 1e-5
# Loss in nats over 20 steps in which it halves. Measured 1.7e-6 (the last place of a loss of 4.5 is
# 4.8e-7); an error of 1e-3: from 3.5e-5.
LOSS_CURVE = 1.5e-5
# Norms of the gradients over their size, in the same steps. Measured 4.6e-6; with an error: 1.0e-4.
NORM_CURVE = 5e-5
# Change of the parameters over 10 steps against float64, over the largest change of a tensor.
# Measured 1.3e-6, most of it the float32 master's rounding; an error of 1e-3: from 6.1e-5.
ADAMW_UPDATE = 1e-5
# Measured 8.2e-7; an error of 1e-3: from 8.8e-5.
MUON_UPDATE = 2e-5
# Newton-Schulz multiplies what is below the rank, rounding there, by up to 3.4445^5 = 485. Measured
# 4.1e-5 on gradients of rank 2.
MUON_UPDATE_LOW_RANK = 2e-4
# Optimizer state after those steps, over its largest value. Measured 4.0e-7; with an error: 2.0e-3.
STATE = 4e-6
# Norm of a 32000 x 768 gradient against float64. Measured 2e-8; a naive sum: 2.9e-2.
NORM = 2e-6
# A compiled step fuses, which rounds otherwise. Measured 9.5e-7.
COMPILED_CURVE = 1.5e-5
# The same curves with a mixture of experts, whose choices could fall otherwise where two probabilities
# are nearly equal: the smallest gap in these rows is 7e-4 at the start. Measured 9.5e-7 and 1.1e-6;
# an error of 1e-3 in a router, an expert, a share or the balance: from 7.5e-5 and 2.3e-4.
EXPERTS_LOSS_CURVE = 1.5e-5
EXPERTS_NORM_CURVE = 5e-5
