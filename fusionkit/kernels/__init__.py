"""Operations with a Triton twin: in each file the plain PyTorch reference first, the twin below."""
