"""The GPU backend: its place in the registry. There are no kernels yet.

dispatch.TRITON_OPERATIONS is empty for as long, so that no call comes here.
"""
