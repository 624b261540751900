//! Series plots as SVG files.

use std::path::Path;

use anyhow::{Context, anyhow};
use plotters::prelude::*;

pub struct Series {
    pub name: String,
    /// Ascending in x.
    pub points: Vec<(f64, f64)>,
}

/// Draws lines into a file; `axes` are the names of x and y. The y axis begins at 0 if `from_zero`.
pub fn lines(
    path: &Path,
    title: &str,
    axes: [&str; 2],
    lines: &[Series],
    from_zero: bool,
) -> anyhow::Result<()> {
    let points = || lines.iter().flat_map(|l| l.points.iter().copied());
    let range = |f: fn((f64, f64)) -> f64| {
        points()
            .map(f)
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)))
    };
    let ((x0, x1), (y0, y1)) = (range(|p| p.0), range(|p| p.1));
    if !(x0.is_finite() && y0.is_finite()) {
        return Err(anyhow!("nothing to plot"));
    }
    let pad = 0.05 * (y1 - y0).max(1e-9);
    let low = if from_zero { 0.0 } else { y0 - pad };
    let mut svg = String::new();
    draw(&mut svg, title, axes, lines, x0..x1.max(x0 + 1e-9), low..y1 + pad)
        .map_err(|e| anyhow!("cannot plot: {e}"))?;
    std::fs::write(path, svg).with_context(|| format!("cannot write {}", path.display()))
}

fn draw(
    svg: &mut String,
    title: &str,
    axes: [&str; 2],
    lines: &[Series],
    x: std::ops::Range<f64>,
    y: std::ops::Range<f64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::with_string(svg, (760, 420)).into_drawing_area();
    root.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&root)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(56)
        .build_cartesian_2d(x, y)?;
    chart.configure_mesh().x_desc(axes[0]).y_desc(axes[1]).light_line_style(WHITE).draw()?;
    for (i, line) in lines.iter().enumerate() {
        let colour = Palette99::pick(i).to_rgba();
        let drawn = chart.draw_series(
            LineSeries::new(line.points.iter().copied(), colour.stroke_width(2)).point_size(3),
        )?;
        drawn
            .label(&line.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], colour.stroke_width(2)));
    }
    chart
        .configure_series_labels()
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.3))
        .draw()?;
    root.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plot_names_its_lines() {
        let path = tempfile::tempdir().unwrap().keep().join("plot.svg");
        let line = |name: &str, y: f64| Series {
            name: name.into(),
            points: vec![(1.0, y), (2.0, y + 1.0)],
        };
        let draw =
            |series: &[Series]| lines(&path, "Speed", ["parallel", "tokens/s"], series, true);
        draw(&[line("plain", 1.0), line("heads", 2.0)]).unwrap();
        let svg = std::fs::read_to_string(&path).unwrap();
        assert!(
            ["Speed", "plain", "heads", "tokens/s", "</svg>"].iter().all(|text| svg.contains(text))
        );
        assert!(draw(&[]).is_err());
    }
}
