// SPDX-License-Identifier: Apache-2.0
// Numbers as people read them; exact values go into titles.

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
const WHOLE = new Intl.NumberFormat("en-US");
const HEAD = 12; // digits of a key that are shown

export function exact(value) {
  return WHOLE.format(value);
}

export function count(value) {
  if (value < 1e6) return WHOLE.format(value);
  const power = Math.min(3, Math.floor(Math.log10(value) / 3));
  return `${digits(value / 1000 ** power)} ${["", "k", "M", "G"][power]}`;
}

export function bytes(value) {
  let power = 0;
  let size = Math.abs(value);
  while (size >= (power === 0 ? 1024 : 999.5) && power < UNITS.length - 1) { // four digits of bytes, else three
    size /= 1024;
    power += 1;
  }
  return `${power === 0 ? Math.round(size) : digits(size)} ${UNITS[power]}`;
}

export const exactBytes = (value) => `${exact(value)} bytes`;
export const rate = (value) => `${bytes(value)}/s`;

export function percent(part) {
  const value = part * 100;
  if (value > 99.95 && part < 1) return "99.9 %"; // all is all
  return `${value === 0 || part === 1 ? Math.round(value) : value.toFixed(1)} %`;
}

export function duration(seconds) {
  const steps = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  let left = Math.max(0, Math.round(seconds));
  const parts = [];
  for (const [unit, size] of steps) {
    if (left >= size || (unit === "s" && !parts.length)) {
      parts.push(`${Math.floor(left / size)} ${unit}`);
      left %= size;
    }
    if (parts.length === 2) break;
  }
  return parts.join(" ");
}

export function clock(unixSeconds) {
  return new Date(unixSeconds * 1000).toLocaleTimeString("en-GB");
}

export const moment = (unixSeconds) => new Date(unixSeconds * 1000).toISOString();
export const shortKey = (key) => (key.length > HEAD ? `${key.slice(0, HEAD)}…` : key);
export const plural = (number, word) => `${exact(number)} ${word}${number === 1 ? "" : "s"}`;
export const isKey = (text) => /^[0-9a-f]{64}$/.test(text);

function digits(value) {
  return value >= 99.95 ? value.toFixed(0) : value >= 9.995 ? value.toFixed(1) : value.toFixed(2);
}
