#!/usr/bin/env bash
# torch 2.13.0: a hook's RemovableHandle can be copied and pickled, until the module that it belongs to is gone.
#
# The handle keeps a weak reference to the module's hooks. Once the module has been freed, copy.deepcopy of the handle,
# or of anything that holds it, raises a TypeError about a weak reference to 'NoneType'; so does reading it back from a
# pickle, which was written without complaint.
# For whom it matters: objects that keep handles of hooks and are copied or checkpointed, for example a model with an
# adapter whose wrapper has been thrown away.
#
# Seen:
#   module alive: deepcopy works, unpickling works
#   module gone:  deepcopy TypeError, unpickling TypeError
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import copy
import gc
import pickle

import torch


def outcome(function):
    try:
        function()
    except TypeError as error:
        assert "weak reference to 'NoneType'" in str(error)
        return "TypeError"
    return "works"


def outcomes(handle):
    written = pickle.dumps(handle)
    return outcome(lambda: copy.deepcopy(handle)), outcome(lambda: pickle.loads(written))


module = torch.nn.Linear(1, 1)
handle = module.register_forward_hook(print)
alive = outcomes(handle)
del module
gc.collect()
gone = outcomes(handle)
print("module alive: deepcopy {}, unpickling {}".format(*alive))
print("module gone:  deepcopy {}, unpickling {}".format(*gone))
assert alive == ("works", "works") and gone == ("TypeError", "TypeError"), "the behaviour has changed"
PYTHON
