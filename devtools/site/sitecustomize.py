"""Python imports this by itself when ``dev.py`` starts a script (``python``, ``bench``, ``test``): the folder is on
its search path. Without a GPU, importing ComfyUI's modules fails unless they are told so before; that is done here.
"""

import os

if os.environ.get("SCALPEL_DEVICE") == "cpu":
    from comfy.cli_args import args

    args.cpu = True
