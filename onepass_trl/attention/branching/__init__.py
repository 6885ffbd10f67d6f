"""Layers that carry state along the row, made to branch it at the nodes of a tree.

Linear attention (gated delta rule, Kimi delta attention, Mamba 2) and short convolutions compute a
token from those before it in the row; on a tree these have to be the tokens before it in its own
pass. transformers computes both in functions of a modeling module and hands them the keyword
arguments that the model gets. `layers` puts functions in their place that, given `visible_end`,

- run the recurrence along the passes, each segment from the state in which its parent segment ends:
  Mamba 2 by its own scan of all chunks of the tree (`mamba2`), a delta rule in PyTorch for all
  chunks too (`chunked_delta_rule`), and another by calling it for each segment (`recurrences`);
- convolve along the row, and once more the few tokens at seams, with their own predecessors
  (`convolutions`).

All of it follows from `segments` and `chunks`, which know trees and no layers. Without
`visible_end` the original functions run, so generation doesn't change.
"""
