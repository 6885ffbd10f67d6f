"""Layers that carry state along the row, made to branch it at the nodes of a tree.

Linear attention (gated delta rule, Kimi delta attention, Mamba 2) and short convolutions compute a
token from those before it in the row; on a tree these have to be the tokens before it in its own
pass. transformers computes both in functions of a modeling module and hands them the keyword
arguments that the model gets. `layers` puts functions in their place that, given `visible_end`,

- run the recurrence segment by segment, each from the state in which its parent segment ends
  (`delta_rule` and `mamba2`, by `recurrences`);
- convolve along the row, and once more the few tokens at seams, with their own predecessors
  (`convolutions`).

Both follow from `segments`, which knows trees and no layers. Without `visible_end` the original
functions run, so generation doesn't change.
"""
