"""What ``dev.py`` is made of. Standard library only, except ``demo.py``, which runs in the environment it makes."""
