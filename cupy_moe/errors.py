"""Every error that cupy_moe raises on purpose. Wrong arguments are plain `TypeError` and `ValueError`."""


class CupyMoeError(RuntimeError):
    """Base of the errors below."""


class ConfigError(CupyMoeError, ValueError):
    """An environment variable or a target name has a value that means nothing."""


class DependencyError(CupyMoeError):
    """CuPy or NVRTC is missing or cannot be loaded."""


class CompileError(CupyMoeError):
    """NVRTC refused a kernel source; the message carries its log."""


class KernelNotPrebuiltError(CupyMoeError):
    """No image of a kernel runs on this device, and none may or can be compiled here."""


class KernelLoadError(CupyMoeError):
    """The driver refused every image of a kernel, or refused to load one now."""


class KernelLaunchError(CupyMoeError):
    """The driver refused to launch a kernel; an earlier kernel's fault may show here, too."""


class PeerError(CupyMoeError):
    """Another rank of a process group failed, is gone, or came too late."""
