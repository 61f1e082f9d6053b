"""A small table of English synonyms for captions: one group a line, each word may stand in for the others.

EDA itself draws from WordNet (117,000 groups); this table is ours, made so that nothing has to be downloaded. A larger one
can be given by path, in this format.
"""

GROUPS = """
# sizes, shapes and amounts
big, large, huge, giant
small, little, tiny, miniature
tall, high, towering
short, low
long, lengthy, extended
wide, broad
narrow, thin, slim
thick, dense
round, circular
circle, disc, ring
square, box
triangle, wedge
ball, sphere, globe
cube, block
line, stripe, band
dot, spot, point
edge, border, rim
corner, angle
many, numerous, several
few, couple
group, bunch, cluster
pair, couple, duo
pile, heap, stack
piece, bit, part
row, line, queue
half, part
full, filled, packed
empty, bare, vacant
single, lone, solitary
various, assorted, different
# colours and light
red, crimson, scarlet
green, emerald, olive
blue, azure, navy
yellow, golden, amber
orange, tangerine
purple, violet, lilac
pink, rose
brown, tan, chestnut
black, dark, ebony
white, pale, ivory
gray, grey, silver
cyan, turquoise, teal
magenta, fuchsia
gold, golden
bright, vivid, brilliant
colorful, colourful, multicolored
color, colour, shade, hue
dim, dark, gloomy
light, glow, shine
shadow, shade
transparent, clear
# looks and states
old, aged, ancient, vintage
new, fresh, modern
young, youthful
beautiful, lovely, gorgeous, pretty
cute, adorable, sweet
ugly, unsightly
clean, spotless, tidy
dirty, muddy, grimy
happy, cheerful, smiling
sad, unhappy
angry, mad
tired, weary, sleepy
fast, quick, speedy
slow, sluggish
hot, warm
cold, chilly, cool
wet, damp, soaked
dry, arid
soft, gentle
hard, solid, firm
smooth, even, flat
rough, uneven, coarse
heavy, weighty
quiet, calm, peaceful, still
loud, noisy
busy, crowded
famous, renowned, popular
strange, odd, unusual
simple, plain, basic
fancy, elegant, ornate
traditional, classic
rich, wealthy
broken, damaged, cracked
wooden, timber
shiny, glossy, polished
fluffy, furry, fuzzy
wild, untamed
open, unclosed
closed, shut
# people
man, guy, gentleman, male
woman, lady, female
boy, lad
girl, lass
child, kid, youngster
children, kids, youngsters
baby, infant, newborn
people, persons, folks
person, individual, human
crowd, throng, audience
friend, companion, pal
friends, companions, pals
mother, mom, mum
father, dad
family, household
couple, pair
player, athlete
players, athletes
team, squad
worker, laborer, employee
soldier, trooper
artist, painter
actor, performer
singer, vocalist
musician, performer
doctor, physician
student, pupil
students, pupils
teacher, instructor
chef, cook
bride, newlywed
tourist, traveler, visitor
tourists, travelers, visitors
driver, motorist
# animals
dog, hound, canine
puppy, pup
cat, feline
kitten, kitty
horse, stallion, pony
cow, cattle
sheep, lamb
pig, hog, swine
rabbit, bunny, hare
mouse, rodent
bird, fowl
chicken, hen
rooster, cock
insect, bug
snake, serpent
frog, toad
donkey, mule
monkey, ape
tiger, wildcat
animal, creature, beast
animals, creatures, beasts
pet, animal
# vehicles
car, automobile, vehicle, auto
truck, lorry
bus, coach
van, minivan
bicycle, bike, cycle
motorcycle, motorbike
train, locomotive
airplane, plane, aircraft, aeroplane
boat, vessel
ship, vessel, liner
taxi, cab
subway, metro
wheel, tire
# places and nature
house, home, residence
building, structure, edifice
room, chamber
kitchen, cookhouse
bathroom, restroom, washroom
bedroom, chamber
street, road, avenue
path, trail, track
highway, motorway, freeway
bridge, overpass
city, town, metropolis
village, hamlet
park, garden
yard, lawn
field, meadow, pasture
forest, woods, woodland
mountain, peak, mount
mountains, peaks, hills
hill, slope
river, stream
lake, pond
sea, ocean
beach, shore, seaside, coast
island, isle
sky, heavens
sun, sunshine
sunset, dusk, sundown
sunrise, dawn, daybreak
night, nighttime
day, daytime
snow, snowfall
rain, rainfall, shower
storm, tempest
tree, sapling
trees, woods
flower, blossom, bloom
flowers, blossoms, blooms
plant, shrub
plants, shrubs
grass, lawn, turf
leaf, frond
leaves, foliage
rock, stone, boulder
rocks, stones, boulders
sand, grit
water, liquid
fire, flame, blaze
shop, store, boutique
restaurant, diner, eatery
hotel, inn
school, academy
church, chapel
castle, palace, fortress
office, workplace
stadium, arena
airport, airfield
station, depot
harbor, port
background, backdrop
view, scene, vista, sight
landscape, scenery
place, spot, location
center, centre, middle
# things
photo, photograph, picture, image, snapshot
drawing, sketch
painting, artwork
illustration, graphic
poster, placard
sign, notice
couch, sofa, settee
chair, seat
table, desk
bed, cot
rug, carpet, mat
cup, mug
glass, tumbler
plate, dish
bowl, basin
bottle, flask
bag, sack
box, carton, crate
basket, hamper
phone, telephone
computer, laptop, pc
television, tv, telly
screen, monitor, display
lamp, lantern
clock, timepiece
book, volume
gift, present
toy, plaything
shirt, top, blouse
pants, trousers
jacket, coat
dress, gown
hat, cap
shoes, footwear
sunglasses, shades
jewelry, jewellery
clothes, clothing, apparel
food, meal
dinner, supper
bread, loaf
cake, pastry
candy, sweets
cookie, biscuit
drink, beverage
vegetables, veggies
fence, railing
wall, partition
door, gate, entrance
floor, ground
stairs, steps
weapon, arm
movie, film
music, melody, tune
game, match
party, celebration
wedding, marriage
award, prize
money, cash
# doing
walking, strolling
walks, strolls
walk, stroll
running, jogging, racing
runs, jogs
run, jog
jumping, leaping, hopping
jumps, leaps
jump, leap
sitting, seated
sits, perches
standing, upright
lying, reclining, resting
sleeping, dozing, napping
sleeps, dozes
eating, dining, munching
eats, munches
drinking, sipping
holding, gripping, grasping
holds, grips
carrying, bearing
carries, bears
looking, gazing, staring
looks, gazes
watching, viewing, observing
talking, chatting, speaking
smiling, grinning, beaming
laughing, chuckling
crying, weeping
playing, frolicking
riding, mounting
driving, steering
flying, soaring, gliding
flies, soars
swimming, bathing
climbing, ascending
falling, dropping
throwing, tossing, hurling
throws, tosses
catching, grabbing
hitting, striking
cutting, slicing
cooking, preparing
making, creating
building, constructing
working, laboring
waiting, lingering
posing, modeling
wearing, sporting
wears, sports
showing, displaying
shows, displays
surrounded, encircled
covered, coated
filled, loaded, packed
decorated, adorned
parked, stationed
located, situated
shown, displayed, pictured
begin, start
finish, end
get, obtain
help, assist
# where
near, beside, by
above, over
below, under, beneath, underneath
behind, after
inside, within
outside, outdoors
between, amid
across, over
around, about
"""
