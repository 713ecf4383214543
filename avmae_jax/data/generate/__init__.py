"""Made-up clips whose sound follows from what is seen, for the demo, the tests, and anyone without data.

Bodies of three materials bounce, roll in a valley, or glide over a table seen from above. Every contact
sounds: the pitch tells the size, the timbre the material, the loudness the speed and the distance, the
balance between left and right the place. `scene.py` draws what happens, `picture.py` shows it, `sound.py`
makes it heard, `clip.py` puts the two together and writes files.
"""

from avmae_jax.data.generate.clip import GeneratedClip, generate_clip, write_clips, write_mp4
from avmae_jax.data.generate.scene import LABELS

__all__ = ['LABELS', 'GeneratedClip', 'generate_clip', 'write_clips', 'write_mp4']
