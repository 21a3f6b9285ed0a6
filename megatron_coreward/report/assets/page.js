"use strict";
// Values under the pointer, and the browser of samples. Every text of a run is set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  function make(tag, className, ...children) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  // ---- charts ----
  const tip = document.getElementById("tip");

  function nearest(sorted, wanted) {
    let best = 0;
    for (let i = 1; i < sorted.length; i++) {
      if (Math.abs(sorted[i] - wanted) < Math.abs(sorted[best] - wanted)) best = i;
    }
    return best;
  }

  function follow(figure, chart) {
    const svg = figure.querySelector("svg");
    const cursor = svg.querySelector(".cursor");
    const [left, right] = chart.edges;
    const [first, last] = chart.steps;
    const steps = [...new Set(chart.lines.flatMap((line) => line.at))].sort((a, b) => a - b);

    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const step = steps[nearest(steps, first + ((x - left) / (right - left)) * (last - first))];
      const at = last > first ? left + ((step - first) / (last - first)) * (right - left) : (left + right) / 2;
      cursor.setAttribute("x1", at);
      cursor.setAttribute("x2", at);
      cursor.setAttribute("visibility", "visible");
      tip.replaceChildren(make("b", "", `step ${step}`));
      for (const line of chart.lines) {
        const place = line.at.indexOf(step);
        if (place < 0) continue;
        const dot = make("i");
        dot.style.background = line.color;
        tip.append(make("div", "", make("span", "", dot, line.name), make("span", "", line.shown[place])));
      }
      tip.hidden = false;
      const beside = event.clientX + tip.offsetWidth + 24 < window.innerWidth;
      tip.style.left = `${beside ? event.clientX + 14 : event.clientX - tip.offsetWidth - 14}px`;
      tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - tip.offsetHeight - 8)}px`;
    });
    svg.addEventListener("pointerleave", () => {
      tip.hidden = true;
      cursor.setAttribute("visibility", "hidden");
    });
  }

  for (const figure of document.querySelectorAll("figure[data-chart]")) {
    follow(figure, data.charts[Number(figure.dataset.chart)]);
  }

  // ---- samples ----
  const root = document.getElementById("browser");
  if (!root || !data.samples.length) return;
  const stepChoice = root.querySelector("#step");
  const filterChoice = root.querySelector("#filter");
  const search = root.querySelector("#search");
  const list = root.querySelector(".list");
  const detail = root.querySelector(".detail");

  const policy = (question) => question.groups.filter((group) => group.role === "policy");
  const some = (test) => (question) => policy(question).some(test);
  const filters = {
    all: () => true,
    flat: some((group) => group.rollouts.every((rollout) => !rollout.advantage)),
    split: some((group) => group.share < 0.5),
    tie: some((group) => group.tie),
    nolabel: some((group) => group.label === null),
    noanswer: some((group) => group.rollouts.some((rollout) => rollout.answer === null)),
    cut: some((group) => group.rollouts.some((rollout) => rollout.cut)),
    other: some((group) => group.label !== null && group.vote !== group.label),
    wrong: (question) => question.ground_truth !== null && some((group) => group.label !== question.ground_truth)(question),
  };

  const shown = { step: 0, question: 0 };

  function matching() {
    const words = search.value.toLowerCase();
    const keep = filters[filterChoice.value];
    return data.samples[shown.step].questions
      .map((question, place) => ({ question, place }))
      .filter(({ question }) => keep(question))
      .filter(({ question }) => !words || JSON.stringify(question).toLowerCase().includes(words));
  }

  // What a person asked, of a prompt with the marks and roles of a chat template: its last turn that says something.
  function asked(prompt) {
    const turns = prompt.split(/<\|[^|]*\|>/).map((turn) => turn.trim());
    const said = turns
      .filter((turn) => !/^assistant\b/.test(turn))
      .map((turn) => turn.replace(/^(system|user)(\n|$)/, "").trim())
      .filter((turn) => turn);
    return said.length ? said[said.length - 1] : prompt;
  }

  function drawList() {
    const found = matching();
    list.replaceChildren();
    for (const { question, place } of found) {
      const first = question.groups.find((group) => group.role === "policy") || question.groups[0];
      const button = make("button", "", question.uid, make("small", "", asked(first.prompt)));
      button.type = "button";
      if (place === shown.question) button.setAttribute("aria-current", "true");
      button.addEventListener("click", () => go(shown.step, place));
      list.append(button);
    }
    const all = data.samples[shown.step];
    root.querySelector(".count").textContent =
      `${found.length} shown, ${all.questions.length} on this page, ${all.of} in the step`;
    return found;
  }

  function fact(name, value) {
    return make("div", "", make("span", "", `${name} `), make("b", "", value));
  }

  function answerTag(rollout) {
    if (rollout.answer === null) return make("span", "tag bad", rollout.cut ? "cut off, no answer" : "no answer");
    return make("span", rollout.winner ? "tag good" : "tag", rollout.answer);
  }

  function drawGroup(group) {
    const rows = group.rollouts.map((rollout) => {
      const row = make("tr", "", make("td", "", make("pre", "", rollout.text)), make("td", "", answerTag(rollout)));
      row.append(make("td", "n", rollout.reward === null ? "" : String(rollout.reward)));
      row.append(make("td", "n", rollout.advantage === null ? "" : rollout.advantage.toFixed(2)));
      row.append(make("td", "n", rollout.cut ? `${rollout.tokens}, cut` : String(rollout.tokens)));
      return row;
    });
    const heads = ["rollout", "answer", "reward", "advantage", "tokens"];
    const head = make("tr", "", ...heads.map((name, place) => make("th", place > 1 ? "n" : "", name)));
    const vote = group.vote === null ? (group.abstained ? "abstains" : "none") : group.vote;
    const facts = make("div", "facts", fact("its vote", `${vote} (${Math.round(100 * group.share)}%${group.tie ? ", tied" : ""})`));
    if (group.role === "policy") facts.append(fact("rewarded against", group.label === null ? "no label" : group.label));
    return make(
      "div", "group",
      make("h3", "", `${group.view} question, ${group.role === "policy" ? "the policy's" : "the teacher's"} rollouts`),
      make("div", "prompt", make("pre", "", group.prompt)),
      facts,
      make("table", "", make("thead", "", head), make("tbody", "", ...rows)),
    );
  }

  function drawDetail() {
    const { questions, step } = data.samples[shown.step];
    const question = questions[shown.question];
    if (!question) {
      detail.replaceChildren(make("p", "dim", "No question here."));
      return;
    }
    const head = make("div", "facts", fact("step", String(step)), fact("question", question.uid));
    if (question.ground_truth !== null) head.append(fact("the data set's answer", question.ground_truth));
    detail.replaceChildren(head, ...question.groups.map(drawGroup));
  }

  function go(step, question) {
    shown.step = step;
    shown.question = question;
    stepChoice.value = String(step);
    const found = drawList();
    if (found.length && !found.some(({ place }) => place === question)) {
      go(step, found[0].place);
      return;
    }
    if (!found.length) shown.question = -1;
    drawDetail();
    const name = `#step=${data.samples[step].step}&question=${shown.question + 1}`;
    if (started) history.replaceState(null, "", name);
  }

  function fromAddress() {
    const match = /^#step=(\d+)(?:&question=(\d+))?$/.exec(location.hash);
    if (!match) return null;
    const step = nearest(data.samples.map((entry) => entry.step), Number(match[1]));
    return [step, Number(match[2] || 1) - 1];
  }

  let started = false;
  data.samples.forEach((entry, place) => {
    const option = make("option", "", `step ${entry.step}`);
    option.value = String(place);
    stepChoice.append(option);
  });
  stepChoice.addEventListener("change", () => go(Number(stepChoice.value), shown.question));
  filterChoice.addEventListener("change", () => go(shown.step, shown.question));
  search.addEventListener("input", () => go(shown.step, shown.question));
  document.addEventListener("keydown", (event) => {
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
    const places = matching().map(({ place }) => place);
    const here = places.indexOf(shown.question);
    if (event.key === "j" && here + 1 < places.length) go(shown.step, places[here + 1]);
    if (event.key === "k" && here > 0) go(shown.step, places[here - 1]);
  });
  window.addEventListener("hashchange", () => {
    const wanted = fromAddress();
    if (wanted) go(...wanted);
  });
  const wanted = fromAddress();
  go(...(wanted || [data.samples.length - 1, 0]));
  started = true;
  if (wanted) root.closest("section").scrollIntoView();
})();
