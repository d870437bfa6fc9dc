// A chart of how long each command of a device took: one point per command. uPlot is loaded at the first chart.

import { clock, utc } from "./format.mjs";
import { html, useEffect, useRef } from "./html.mjs";

let loading = null;
function load() {
  loading ??= import("./vendor/uplot.mjs").then((module) => {
    const style = document.createElement("link");
    Object.assign(style, { rel: "stylesheet", href: "/console/assets/vendor/uplot.css" });
    document.head.append(style);
    return module.default;
  });
  return loading;
}

const HEIGHT_PX = 140;
const tens = (_, all) => all.map((value) => (value !== null && Number.isInteger(Math.log10(value)) ? value : null));
// Labels show whole seconds; where ticks are closer than that, only the first one of a second has a label.
const once = (labels) => labels.map((label, place) => (label === labels[place - 1] ? "" : label));
const round = (ms) => (ms === null ? "" : ms < 1_000 ? `${ms} ms` : `${ms / 1_000} s`);

/** The series: time of creation in seconds; ms from hand-over to result of executed commands; and of failed ones. */
function series(commands) {
  const ended = commands.filter((each) => each.published_at && (each.executed_at || each.state === "failed")).reverse();
  const took = (each) => Math.max(1, Date.parse(each.executed_at ?? each.delivered_at ?? each.published_at) - Date.parse(each.published_at));
  return [
    ended.map((each) => Date.parse(each.created_at) / 1_000),
    ended.map((each) => (each.state === "executed" ? took(each) : null)),
    ended.map((each) => (each.state === "failed" ? took(each) : null)),
  ];
}

export function Latency({ commands }) {
  const box = useRef(null);
  const plot = useRef(null);
  const data = series(commands);
  const enough = data[0].length >= 3;
  const zone = utc.value;
  useEffect(() => {
    if (!enough) return undefined;
    let gone = false;
    let watch;
    load().then((Plot) => {
      if (gone) return;
      const style = getComputedStyle(document.documentElement);
      const colour = (name) => style.getPropertyValue(name).trim();
      const probe = document.createElement("span");
      const real = (name) => {
        // The browser resolves light-dark() only in an element that uses it.
        probe.style.color = `var(${name})`;
        box.current.append(probe);
        const found = getComputedStyle(probe).color;
        probe.remove();
        return found || colour(name);
      };
      const axis = { stroke: real("--dim"), grid: { stroke: real("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui" };
      const dots = (stroke) => ({ stroke, paths: () => null, points: { show: true, size: 5, fill: stroke } });
      plot.current = new Plot(
        {
          width: box.current.clientWidth,
          height: HEIGHT_PX,
          legend: { show: false },
          cursor: { show: false },
          scales: { y: { distr: 3 } },
          axes: [
            { ...axis, values: (_, all) => once(all.map((sec) => clock(sec * 1_000))) },
            { ...axis, size: 56, filter: tens, grid: { ...axis.grid, filter: tens }, values: (_, all) => all.map(round) },
          ],
          series: [{}, dots(real("--s-executed")), dots(real("--s-failed"))],
        },
        data,
        box.current,
      );
      watch = new ResizeObserver(() => box.current && plot.current.setSize({ width: box.current.clientWidth, height: HEIGHT_PX }));
      watch.observe(box.current);
    });
    return () => {
      gone = true;
      watch?.disconnect();
      plot.current?.destroy();
      plot.current = null;
    };
  }, [enough, zone]);
  useEffect(() => plot.current?.setData(data), [commands]);
  if (!enough) return null;
  const words = `${data[0].length} commands: time from hand-over to result, one point per command`;
  return html`<figure class="chart"><div ref=${box} role="img" aria-label=${words}></div><figcaption class="dim">time from hand-over to result, one point per command</figcaption></figure>`;
}
