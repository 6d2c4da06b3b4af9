"""The same networks, faster: fused kernels, compiled blocks, fp8, attention back ends."""
