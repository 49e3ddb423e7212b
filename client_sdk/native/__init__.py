"""The torch-free runtime: a small C++ shim over ExecuTorch, compiled once per machine and loaded with ctypes."""
