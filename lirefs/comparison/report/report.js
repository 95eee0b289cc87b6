"use strict";
(() => {
  const PER_PAGE = 25;
  const byId = (id) => document.getElementById(id);
  const make = (name, text, kind) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (kind) element.className = kind;
    return element;
  };

  // Tables: numbers by value, text by letter, what is undefined last.
  const keyOf = (row, column) => {
    const cell = row.cells[column];
    if (cell.dataset.value === undefined) return cell.textContent.trim();
    return cell.dataset.value === "" ? null : Number(cell.dataset.value);
  };
  const compare = (one, other) =>
    typeof one === "number" && typeof other === "number"
      ? one - other
      : String(one).localeCompare(String(other), "en", { numeric: true });
  const sort = (heading) => {
    const column = heading.cellIndex;
    const body = heading.closest("table").tBodies[0];
    const falling = heading.getAttribute("aria-sort") === "ascending";
    const rows = [...body.rows].map((row) => [keyOf(row, column), row]);
    rows.sort(([one], [other]) => {
      if (one === null || other === null) return (one === null) - (other === null);
      return falling ? compare(other, one) : compare(one, other);
    });
    for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
    body.append(...rows.map(([, row]) => row));
  };
  for (const button of document.querySelectorAll("button.sort")) {
    button.addEventListener("click", () => sort(button.closest("th")));
  }

  // Sections: a link opens the one that it leads to, print opens all.
  const sections = [...document.querySelectorAll("details.section")];
  const openTarget = () => {
    const target = sections.find((one) => `#${one.id}` === location.hash);
    if (target) target.open = true;
    target?.scrollIntoView();
  };
  addEventListener("hashchange", openTarget);
  for (const link of document.querySelectorAll("nav a")) {
    link.addEventListener("click", () => setTimeout(openTarget)); // a second click changes no hash
  }
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = sections.filter((one) => !one.open);
    for (const one of folded) one.open = true;
  });
  addEventListener("afterprint", () => {
    for (const one of folded) one.open = false;
  });
  openTarget();

  // Tables: what is cut off says so.
  const markWide = () => {
    for (const box of document.querySelectorAll(".scroll")) {
      box.classList.toggle("wide", box.scrollWidth > box.clientWidth + 1);
    }
  };
  addEventListener("resize", markWide);
  for (const one of document.querySelectorAll("details.section")) {
    one.addEventListener("toggle", markWide); // what is folded has no width
  }
  markWide();

  // Flipped items: filtered all at once, drawn a page at a time.
  const data = JSON.parse(byId("flip-data").textContent);
  const item = (flip) => data.items[flip[0]];
  const boxes = ["task", "variant", "change", "text"].map((name) => byId(`flip-${name}`));
  const fill = (box, names) =>
    names.forEach((name, place) => {
      const option = make("option", name);
      option.value = place;
      box.append(option);
    });
  fill(boxes[0], data.tasks);
  fill(boxes[1], data.variants);
  const SAME = 0, BEFORE = 1, AFTER = 2; // as in words_diff.py
  const textAfter = (flip) =>
    flip[3].filter(([kind]) => kind !== BEFORE).map(([, text]) => text).join("");
  const texts = [];
  const textOf = (place) => {
    const [, id, prompt, expected, before] = item(data.flips[place]);
    return (texts[place] ??= [id, prompt, expected, before, textAfter(data.flips[place])]
      .join("\n").toLowerCase());
  };
  let chosen = [];
  let page = 0;

  const filter = () => {
    const [task, variant, change, text] = boxes.map((box) => box.value);
    const words = text.trim().toLowerCase();
    chosen = data.flips.flatMap((flip, place) =>
      (task === "" || item(flip)[0] === Number(task)) &&
      (variant === "" || flip[1] === Number(variant)) &&
      (change === "" || flip[2] === Number(change)) &&
      (words === "" || textOf(place).includes(words)) ? [flip] : []);
    page = 0;
    draw();
  };
  const side = (name, parts, kind) => {
    const box = make("div", undefined, kind);
    const shown = make("dd", parts.length ? undefined : "(nothing)", "text");
    const names = { [SAME]: "span", [BEFORE]: "del", [AFTER]: "ins" };
    shown.append(...parts.map(([where, text]) => make(names[where], text)));
    box.append(make("dt", name), shown);
    return box;
  };
  const card = (flip) => {
    const [task, id, prompt, expected] = item(flip);
    const [, variant, gained, parts] = flip;
    const box = make("article", undefined, "flip");
    const heading = make("h4");
    heading.append(
      make("span", gained ? "gained" : "lost", gained ? "badge gained" : "badge"),
      `${data.tasks[task]} \u00b7 ${data.variants[variant]} \u00b7 ${id}`);
    box.append(heading);
    if (data.shared[task]) {
      const folded = make("details");
      folded.append(
        make("summary", "beginning shared by all prompts of this task"),
        make("p", data.shared[task], "text"));
      box.append(folded);
    }
    const sides = make("dl", undefined, "sides");
    sides.append(
      side("expected", expected === "" ? [] : [[SAME, expected]], ""),
      side("unchanged", parts.filter(([where]) => where !== AFTER), gained ? "wrong" : "right"),
      side(data.variants[variant], parts.filter(([where]) => where !== BEFORE),
        gained ? "right" : "wrong"));
    box.append(make("p", prompt, "text"), sides);
    return box;
  };
  const draw = () => {
    const pages = Math.max(1, Math.ceil(chosen.length / PER_PAGE));
    byId("flip-list").replaceChildren(
      ...chosen.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(card));
    byId("flip-count").textContent =
      `${chosen.length.toLocaleString("en")} of ${data.flips.length.toLocaleString("en")} items`;
    byId("flip-page").textContent = `page ${page + 1} of ${pages}`;
    byId("flip-back").disabled = page === 0;
    byId("flip-next").disabled = page + 1 >= pages;
  };
  const turn = (step) => {
    page += step;
    draw();
    byId("flips").scrollIntoView();
  };
  for (const box of boxes) box.addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(filter));
  byId("flip-back").addEventListener("click", () => turn(-1));
  byId("flip-next").addEventListener("click", () => turn(1));
  filter();

  // Copies: tab-separated, a line an entry, whatever a text holds.
  const inLine = (fields) =>
    fields.map((field) => String(field).replace(/\s+/g, " ").trim()).join("\t");
  const sources = {
    table: (button) =>
      [...button.closest("table").rows].map((row) =>
        inLine([...row.cells].map((cell) => cell.textContent))).join("\n"),
    settings: () => byId("settings-json").textContent,
    flips: () =>
      [["task", "variant", "change", "id", "prompt", "expected", "unchanged", "changed"],
        ...chosen.map((flip) => {
          const [task, id, prompt, expected, before] = item(flip);
          return [data.tasks[task], data.variants[flip[1]], flip[2] ? "gained" : "lost",
            id, prompt, expected, before, textAfter(flip)];
        })].map(inLine).join("\n"),
  };
  const copyBySelection = (text) => {
    const box = make("textarea", text);
    box.setAttribute("aria-label", "text to copy");
    document.body.append(box);
    box.select();
    const done = document.execCommand("copy");
    box.remove();
    return done;
  };
  const copy = async (text) => {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch { // no clipboard here, or not allowed
      return copyBySelection(text);
    }
  };
  for (const button of document.querySelectorAll("button.copy")) {
    const name = button.textContent;
    button.addEventListener("click", async () => {
      const done = await copy(sources[button.dataset.copy](button));
      button.textContent = done ? "copied" : "cannot copy here";
      setTimeout(() => { button.textContent = name; }, 1500);
    });
  }
})();
