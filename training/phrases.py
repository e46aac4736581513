"""The phrases of the caption grammar: for each category, the ways to say it. All lower case."""

SUBJECT = {
    "lighthouse": (
        "a lighthouse",
        "a lone lighthouse",
        "an old lighthouse",
        "a tall lighthouse",
        "a {c} lighthouse",
        "a lighthouse tower",
        "the lighthouse",
    ),
    "house": (
        "a house",
        "a cabin",
        "a cottage",
        "a small house",
        "a hut",
        "a house with a {c} roof",
        "a lonely cabin",
        "a little cottage",
        "a farmhouse",
    ),
    "sailboat": (
        "a sailboat",
        "a sailing boat",
        "a boat",
        "a small boat",
        "a sailboat with {c} sails",
        "a yacht",
        "a boat with sails",
    ),
    "ship": (
        "a ship",
        "a steamer",
        "a steamship",
        "a large ship",
        "a {c} ship",
        "a big ship",
        "a vessel",
        "an ocean liner",
    ),
    "castle": (
        "a castle",
        "a fortress",
        "a stone castle",
        "an old castle",
        "a castle with {c} roofs",
        "an ancient castle",
        "a castle with towers",
    ),
    "tree": ("a tree", "a lone tree", "a big tree", "a lonely tree", "an oak tree", "an oak", "a single tree"),
    "bridge": ("a bridge", "a stone bridge", "an old bridge", "an arched bridge", "a bridge with arches"),
    "windmill": ("a windmill", "an old windmill", "a mill", "a {c} windmill", "a dutch windmill"),
    "tent": ("a tent", "a {c} tent", "a camping tent", "a camp", "a small tent"),
    "balloon": ("a hot air balloon", "a balloon", "a {c} balloon", "a {c} hot air balloon", "a flying balloon"),
    "birds": ("birds", "a flock of birds", "flying birds", "seagulls", "gulls", "a few birds"),
    "cactus": ("a cactus", "a tall cactus", "a saguaro", "a saguaro cactus", "a green cactus", "a lone cactus"),
}
# setting -> (bare noun phrases, phrases that place a subject there)
SETTING = {
    "sea": (
        ("the sea", "the ocean", "the open sea", "calm sea", "the waves", "seascape", "open water", "the wide ocean"),
        (
            "on the sea",
            "at sea",
            "on the ocean",
            "in the ocean",
            "on the water",
            "on the waves",
            "in the sea",
            "over the sea",
        ),
    ),
    "lake": (
        ("a lake", "a calm lake", "lake", "the lake", "a quiet lake", "still lake water"),
        ("by a lake", "on a lake", "at the lake", "near a lake", "by the lake", "on the lake shore", "over a lake"),
    ),
    "beach": (
        ("a beach", "a sandy beach", "the beach", "the coast", "seashore", "a sandy shore"),
        (
            "on a beach",
            "on the beach",
            "at the beach",
            "on the shore",
            "at the seashore",
            "by a sandy beach",
            "on the coast",
        ),
    ),
    "cliff": (
        (
            "a cliff",
            "a rocky cliff",
            "a cliff by the sea",
            "a sea cliff",
            "rocky cliffs above the sea",
            "a rocky coast with a cliff",
        ),
        (
            "on a cliff",
            "on a rocky cliff",
            "on the cliff",
            "on top of a cliff",
            "on a cliff above the sea",
            "on a cliff by the sea",
            "on the edge of a cliff",
        ),
    ),
    "mountains": (
        (
            "mountains",
            "rocky mountains",
            "the mountains",
            "rocky peaks",
            "mountain landscape",
            "high mountains",
            "a mountain valley",
        ),
        (
            "in the mountains",
            "in front of mountains",
            "near the mountains",
            "below rocky peaks",
            "in a mountain valley",
            "under the mountains",
        ),
    ),
    "snowy mountains": (
        (
            "snowy mountains",
            "snow covered mountains",
            "white mountains",
            "icy peaks",
            "snow capped mountains",
            "snowy peaks",
            "winter mountains",
            "the snowy alps",
        ),
        (
            "in the snowy mountains",
            "in front of snowy mountains",
            "below snowy peaks",
            "near snow covered mountains",
            "under snowy mountains",
            "in the alps",
        ),
    ),
    "desert": (
        (
            "a desert",
            "the desert",
            "sand dunes",
            "desert dunes",
            "sandy dunes",
            "desert",
            "dry desert",
            "a sandy desert",
        ),
        (
            "in the desert",
            "in a desert",
            "on a dune",
            "in the sand dunes",
            "in the dry desert",
            "among sand dunes",
            "on the desert sand",
        ),
    ),
    "forest": (
        ("a forest", "a pine forest", "the woods", "forest", "pine trees", "the forest", "a deep forest"),
        (
            "in a forest",
            "in the woods",
            "in the forest",
            "among pine trees",
            "in a pine forest",
            "near the forest",
            "at the edge of the woods",
        ),
    ),
    "meadow": (
        (
            "a meadow",
            "green hills",
            "a green meadow",
            "a grassy field",
            "rolling hills",
            "countryside",
            "grassland",
            "green fields",
        ),
        (
            "on a meadow",
            "in a meadow",
            "on a green hill",
            "in a field",
            "in the countryside",
            "on a grassy hill",
            "among green hills",
            "in the grass",
        ),
    ),
    "snowfield": (
        (
            "a snowy field",
            "a snowy plain",
            "winter landscape",
            "a frozen plain",
            "snowfield",
            "snow covered fields",
            "winter snow",
        ),
        (
            "in the snow",
            "on a snowy field",
            "in a snowy plain",
            "in a winter landscape",
            "on a frozen plain",
            "in deep snow",
        ),
    ),
}
TIME = {
    "day": (
        "at noon",
        "by day",
        "in daylight",
        "in the afternoon",
        "at midday",
        "during the day",
        "in bright daylight",
    ),
    "sunrise": ("at sunrise", "at dawn", "at daybreak", "in the early morning", "in the morning", "in morning light"),
    "sunset": (
        "at sunset",
        "at sundown",
        "at golden hour",
        "in sunset light",
        "in the golden light of sunset",
        "at sunset",
    ),
    "dusk": ("at dusk", "at twilight", "in the twilight", "in the evening", "in purple twilight", "after sunset"),
    "night": ("at night", "by night", "at midnight", "in the dark night", "at night", "in the night"),
}
TIME_NOUN = {
    "day": ("day", "daylight", "midday", "blue sky", "bright day"),
    "sunrise": ("sunrise", "dawn", "morning", "pink morning sky", "early morning"),
    "sunset": ("sunset", "golden hour", "orange sunset", "red sunset sky", "sundown"),
    "dusk": ("dusk", "twilight", "purple evening", "evening sky", "evening"),
    "night": ("night", "night sky", "midnight", "dark night"),
}
WEATHER = {
    "clear": ("under a clear sky", "clear sky", "clear weather", "cloudless sky"),
    "cloudy": ("with clouds", "under a cloudy sky", "cloudy sky", "overcast", "with white clouds", "clouds"),
    "storm": ("in a storm", "stormy sky", "with dark storm clouds", "stormy weather", "during a thunderstorm", "storm"),
    "fog": ("in the fog", "in the mist", "fog", "covered in mist", "foggy weather", "in thick fog", "misty"),
    "rain": ("in the rain", "rain", "rainy weather", "heavy rain", "on a rainy day", "rainy"),
    "snowfall": (
        "in falling snow",
        "snowfall",
        "while it is snowing",
        "with snowflakes",
        "during a snowfall",
        "falling snow",
    ),
}
WEATHER_ADJECTIVE = {
    "clear": ("peaceful", "serene"),
    "cloudy": ("cloudy",),
    "storm": ("stormy", "wild"),
    "fog": ("foggy", "misty"),
    "rain": ("rainy",),
    "snowfall": ("snowing",),
}
BODY = {
    "sun": ("with the sun", "the sun", "a bright sun", "sun in the sky", "with a low sun"),
    "moon": ("full moon", "with a full moon", "the moon", "under the moon", "a bright moon", "in the moonlight"),
    "crescent": ("crescent moon", "with a crescent moon", "a thin moon", "under a crescent moon"),
}
BACKDROP = {
    "hills": ("distant hills", "with hills in the background", "hills in the distance"),
    "mountains": ("mountains in the background", "with distant mountains", "rocky mountains in the distance"),
    "snowy mountains": (
        "snowy mountains in the background",
        "with snowy peaks in the distance",
        "distant snowy mountains",
    ),
}
STARS = ("stars", "starry sky", "under the stars", "a sky full of stars")
PREFIX = (
    "a painting of",
    "a photo of",
    "an illustration of",
    "a picture of",
    "a view of",
    "a drawing of",
    "a landscape with",
    "a scene with",
    "an image of",
)
SUFFIX = (
    "highly detailed",
    "beautiful",
    "4k",
    "digital art",
    "masterpiece",
    "very detailed",
    "beautiful landscape",
    "colorful",
    "calm",
    "artwork",
    "flat illustration",
    "poster",
    "8k",
    "best quality",
    "dramatic light",
    "sharp",
    "cinematic",
)
DETAIL = {
    "sky": ("sky", "empty sky", "the sky"),
    "clouds": ("clouds", "cloud", "cloudy sky"),
    "sun": ("sun", "the sun"),
    "moon": ("moon", "the moon", "moon with craters"),
    "rock": ("mountain rock", "rocky mountain", "mountain side"),
    "snow": ("snow", "white snow", "snowy ground"),
    "water": ("waves", "water", "rippled water"),
    "sand": ("sand", "sand ripples", "dune"),
    "cliff": ("rocky cliff", "cliff rock", "stone cliff"),
    "grass": ("grass", "green grass", "grassy ground"),
    "pines": ("pine trees", "pine branches", "pines"),
    "lighthouse": ("lighthouse", "lighthouse wall", "lighthouse tower"),
    "house": ("house", "house wall", "roof and window of a house"),
    "sailboat": ("sailboat", "sail", "boat"),
    "ship": ("ship", "ship deck", "hull of a ship"),
    "castle": ("castle", "castle wall", "castle tower"),
    "tree": ("tree", "tree leaves", "tree trunk and leaves"),
    "bridge": ("bridge", "stone bridge", "bridge arch"),
    "windmill": ("windmill", "windmill blades", "windmill wall"),
    "tent": ("tent", "tent cloth", "tent"),
    "balloon": ("balloon", "balloon cloth", "balloon"),
    "birds": ("birds", "bird", "flying bird"),
    "cactus": ("cactus", "cactus spines", "cactus"),
}
DETAIL_FORM = (
    "detail of {}",
    "close up of {}",
    "a close up of {}",
    "closeup of {}",
    "texture of {}",
    "part of {}",
    "a detail of {}",
    "macro of {}",
)
GLUE = (
    "a an the of in on at by with and over under above below near beside behind between from to into through "
    "for is are it its this that very some many few two one small little big large huge tiny tall high low "
    "wide long old new ancient lone lonely quiet silent beautiful pretty nice lovely dramatic epic majestic "
    "mysterious magical fantasy romantic warm cold cool hot dry wet bright dark light soft pale deep black "
    "gray grey pink gold golden silver color colour colors vibrant painting photo photograph picture image "
    "drawing sketch illustration art artwork style watercolor oil vector flat minimal minimalist poster render "
    "realistic detailed highly ultra hd quality best masterpiece sharp focus wallpaper background foreground "
    "distance horizon landscape scenery nature view scene seascape panorama island rocks rock stone stones "
    "shore bay harbor river stream waterfall pond wave ripples reflection reflections shadow shadows glow "
    "glowing beam lamp lantern fire campfire window windows door roof brick bricks wall path road field fields "
    "flower flowers leaves branch bush wind windy breeze cloud rays sunlight moonlight starlight star sunny "
    "sunlit moonlit snow ice icy frozen winter summer spring autumn season weather air peak peaks summit hill "
    "hills hillside slope valley canyon dune dunes sand sandy rocky grassy green wooden "
)


def all_phrases() -> list[str]:
    """Every phrase of the grammar, once."""
    out: list[str] = [GLUE, *PREFIX, *SUFFIX, *STARS, *DETAIL_FORM, "up close"]
    for table in (SUBJECT, TIME, TIME_NOUN, WEATHER, WEATHER_ADJECTIVE, BODY, BACKDROP, DETAIL):
        for phrases in table.values():
            out.extend(phrases)
    for bare, placed in SETTING.values():
        out.extend((*bare, *placed))
    return out
