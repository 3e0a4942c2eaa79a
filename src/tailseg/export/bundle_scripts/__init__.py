"""What the bundle's configuration uses beside MONAI itself. These files stand on their own: they need no TailSeg."""

from . import inference as inference
from . import network as network
from . import preparation as preparation
from . import windows as windows
