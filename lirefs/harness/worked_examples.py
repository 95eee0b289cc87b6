"""Worked examples for chains of thought: one line each, ending in `The answer is N`.

Written for this project; no problem is from a test set.
"""

WORD_PROBLEMS = """\
Q: A bakery bakes 12 trays of rolls with 8 rolls on each tray. It sells 70 rolls before noon. \
How many rolls are left?
A: The bakery bakes 12 * 8 = 96 rolls. After selling 70 of them, 96 - 70 = 26 rolls are left. \
The answer is 26.

Q: Nora has 45 stamps. Her uncle gives her 3 sheets of 10 stamps, and she loses 6 stamps. How \
many stamps does she have now?
A: The sheets hold 3 * 10 = 30 stamps. With them Nora has 45 + 30 = 75 stamps. She loses 6, so \
she has 75 - 6 = 69 stamps. The answer is 69.

Q: A ticket for the museum costs $14 for an adult and half as much for a child. What do 2 adults \
and 5 children pay in dollars?
A: A child pays 14 / 2 = 7 dollars. The adults pay 2 * 14 = 28 dollars and the children pay \
5 * 7 = 35 dollars. Together they pay 28 + 35 = 63 dollars. The answer is 63.

Q: Ravi walks 4 km to work and 4 km back on each of 5 days a week. How many kilometres does he \
walk in 3 weeks?
A: Each day Ravi walks 4 + 4 = 8 km. In a week he walks 8 * 5 = 40 km. In 3 weeks he walks \
40 * 3 = 120 km. The answer is 120.

Q: A tank holds 200 litres. It is 30% full, and then 25 litres are taken out. How many litres are \
in the tank?
A: At first the tank holds 200 * 0.30 = 60 litres. After 25 litres are taken out, 60 - 25 = 35 \
litres are left. The answer is 35.

Q: Lena is three times as old as Max. In 6 years their ages will sum to 52. How old is Max now?
A: In 6 years both together are 6 + 6 = 12 years older than now, so now their ages sum to \
52 - 12 = 40. Lena's age is 3 times Max's, so 40 is 3 + 1 = 4 times Max's age. Max is 40 / 4 = 10. \
The answer is 10.

Q: A printer prints 15 pages a minute. How many minutes does it need for 6 copies of a report of \
50 pages?
A: The copies have 6 * 50 = 300 pages. The printer needs 300 / 15 = 20 minutes. The answer is 20.

Q: Tom saves $1,250 and buys a bicycle for $480 and two helmets for $35 each. How much money in \
dollars does he have left?
A: The helmets cost 2 * 35 = 70 dollars. Tom spends 480 + 70 = 550 dollars. He has \
1250 - 550 = 700 dollars left. The answer is 700.

"""

ARITHMETIC = """\
Q: ((2 + 3 * 4 - 5) + (7 - -1 * 2 + 6)) =
A: The left bracket is 2 + 3 * 4 - 5 = 2 + 12 - 5 = 9. The right bracket is \
7 - -1 * 2 + 6 = 7 + 2 + 6 = 15. So the whole is 9 + 15 = 24. The answer is 24.

Q: ((-4 - 6 * -2 + 1) * (3 - 8 + 2 - 5)) =
A: The left bracket is -4 - 6 * -2 + 1 = -4 + 12 + 1 = 9. The right bracket is \
3 - 8 + 2 - 5 = -8. So the whole is 9 * -8 = -72. The answer is -72.

Q: ((9 * 2 * -1 + 7) - (-3 + 4 - -6 - 2)) =
A: The left bracket is 9 * 2 * -1 + 7 = -18 + 7 = -11. The right bracket is \
-3 + 4 - -6 - 2 = -3 + 4 + 6 - 2 = 5. So the whole is -11 - 5 = -16. The answer is -16.

"""

COUNTING = """\
Q: I have a spoon, two forks, a ladle, and three knives. How many utensils do I have?
A: The utensils are 1 spoon, 2 forks, 1 ladle and 3 knives. Together they are \
1 + 2 + 1 + 3 = 7. The answer is 7.

Q: I have a hammer, a radish, two onions, a drill, a beetroot, and four leeks. How many \
vegetables do I have?
A: The vegetables are 1 radish, 2 onions, 1 beetroot and 4 leeks; a hammer and a drill are none. \
Together they are 1 + 2 + 1 + 4 = 8. The answer is 8.

Q: I have a goose, a stool, a donkey, five hens, a bench, and two mules. How many animals do I \
have?
A: The animals are 1 goose, 1 donkey, 5 hens and 2 mules; a stool and a bench are none. Together \
they are 1 + 1 + 5 + 2 = 9. The answer is 9.

"""
