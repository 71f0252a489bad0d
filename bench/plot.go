//go:build linux

package bench

import (
	"fmt"
	"image/color"
	"io"
	"math"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/text"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// hues are the systems' colours, in the order of Systems: of a palette that the colour-blind can tell apart.
var hues = []color.Color{
	color.RGBA{0xd5, 0x5e, 0x00, 0xff}, color.RGBA{0x00, 0x72, 0xb2, 0xff}, color.RGBA{0x56, 0xb4, 0xe9, 0xff},
	color.RGBA{0x00, 0x44, 0x6b, 0xff}, color.RGBA{0xcc, 0x79, 0xa7, 0xff}, color.RGBA{0x44, 0x44, 0x44, 0xff},
	color.RGBA{0x99, 0x99, 0x99, 0xff}, color.RGBA{0x00, 0x9e, 0x73, 0xff}, color.RGBA{0xe6, 0x9f, 0x00, 0xff},
}

func hue(system string) color.Color {
	for i, s := range Systems {
		if s == system {
			return hues[i]
		}
	}
	return color.Black
}

// WriteSVG draws the report: a row of plots for each placement, with the latencies and two sequential streams.
func (r *FaultReport) WriteSVG(w io.Writer) error {
	canvas := vgsvg.New(17*vg.Inch, vg.Length(len(r.Options.Placements))*4.5*vg.Inch)
	if err := r.draw(draw.New(canvas)); err != nil {
		return fmt.Errorf("plot: %w", err)
	}
	if _, err := canvas.WriteTo(w); err != nil {
		return fmt.Errorf("write plot: %w", err)
	}
	return nil
}

func (r *FaultReport) draw(c draw.Canvas) error {
	var rows [][]*plot.Plot
	for _, p := range r.Options.Placements {
		bars, err := r.plotLatency(p)
		if err != nil {
			return err
		}
		row := []*plot.Plot{bars}
		for _, op := range []Op{ZeroRead, StoredRead} {
			lines, err := r.plotStream(p, op)
			if err != nil {
				return err
			}
			row = append(row, lines)
		}
		rows = append(rows, row)
	}
	drawTiles(c, rows)
	return nil
}

// drawTiles draws rows of plots, which have the same number each.
func drawTiles(c draw.Canvas, rows [][]*plot.Plot) {
	c.FillPolygon(color.White, []vg.Point{c.Min, {X: c.Min.X, Y: c.Max.Y}, c.Max, {X: c.Max.X, Y: c.Min.Y}})
	tiles := draw.Tiles{Rows: len(rows), Cols: len(rows[0]), PadX: vg.Centimeter, PadY: vg.Centimeter,
		PadTop: vg.Millimeter * 3, PadBottom: vg.Millimeter * 3, PadLeft: vg.Millimeter * 3, PadRight: vg.Millimeter * 5}
	for i, line := range plot.Align(rows, tiles, c) {
		for j, tile := range line {
			rows[i][j].Draw(tile)
		}
	}
}

func newPlot(title, x, y string) *plot.Plot {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = title, x, y
	p.Legend.Top = true
	p.Legend.TextStyle.Font.Size = vg.Points(8)
	p.Legend.ThumbnailWidth = vg.Points(12)
	p.Y.Min = 0
	p.Add(plotter.NewGrid())
	return p
}

// plotLatency draws a bar to p50, and a line from there to p99, which is cut at four times the longest bar.
func (r *FaultReport) plotLatency(place Placement) (*plot.Plot, error) {
	p := newPlot("one page, "+string(place)+": p50, and up to p99", "", "us")
	var shown []string
	for _, s := range r.Options.Systems {
		for _, l := range r.Latency {
			if l.System == s && l.Placement == place && l.None == "" {
				shown = append(shown, s)
				break
			}
		}
	}
	top := 0.0 // what rises above would leave the bars no room
	for _, l := range r.Latency {
		top = math.Max(top, 4*l.P50.Median/1e3)
	}
	width := vg.Points(52 / float64(max(1, len(shown))))
	for i, s := range shown {
		heights, tails := make(plotter.Values, len(Ops)), plotter.YErrors{}
		at := plotter.XYs{}
		shift := (float64(i) - float64(len(shown)-1)/2) * 0.75 / float64(len(shown))
		for x, op := range Ops {
			for _, l := range r.Latency {
				if l.System == s && l.Placement == place && l.Op == op && l.None == "" {
					heights[x] = l.P50.Median / 1e3
					at = append(at, plotter.XY{X: float64(x) + shift, Y: heights[x]})
					tails = append(tails, struct{ Low, High float64 }{0, math.Max(0, math.Min(l.P99.Median/1e3, top)-heights[x])})
				}
			}
		}
		bars, err := plotter.NewBarChart(heights, width)
		if err != nil {
			return nil, err
		}
		bars.Color, bars.LineStyle.Width, bars.XMin = hue(s), 0, shift
		tail, err := plotter.NewYErrorBars(struct {
			plotter.XYs
			plotter.YErrors
		}{at, tails})
		if err != nil {
			return nil, err
		}
		tail.Color = hue(s)
		p.Add(bars, tail)
		p.Legend.Add(s, bars)
	}
	p.X.Min, p.X.Max = -0.5, float64(len(Ops))-0.5
	ticks := make([]plot.Tick, len(Ops))
	for i, op := range Ops {
		ticks[i] = plot.Tick{Value: float64(i), Label: string(op)}
	}
	p.X.Tick.Marker = plot.ConstantTicks(ticks)
	p.X.Tick.Label.XAlign = text.XCenter
	p.Y.Max *= 1.5 // room for the legend
	return p, nil
}

// plotStream draws a line for each system by pages per answer; a level one where there is no such choice. What would leave the others no room, like a
// file that is mapped in large pieces, is left out: the table has it.
func (r *FaultReport) plotStream(place Placement, op Op) (*plot.Plot, error) {
	p := newPlot(fmt.Sprintf("sequential %s, %s", op, place), "pages per answer", "GB/s")
	p.Legend.Left = true
	top := 0.0
	for _, x := range r.Streams {
		if x.Cluster > 0 && x.None == "" {
			top = math.Max(top, x.Rate.Median)
		}
	}
	first, last := r.Options.Clusters[0], r.Options.Clusters[len(r.Options.Clusters)-1]
	for _, s := range r.Options.Systems {
		var at plotter.XYs
		for _, x := range r.Streams {
			if x.System != s || x.Op != op || x.Order != Sequential || x.Placement != place || x.None != "" {
				continue
			}
			y := x.Rate.Median / 1e9
			if x.Cluster > 0 {
				at = append(at, plotter.XY{X: math.Log2(float64(x.Cluster)), Y: y})
			} else if x.Rate.Median < 2*top {
				at = append(at, plotter.XY{X: math.Log2(float64(first)), Y: y}, plotter.XY{X: math.Log2(float64(last)), Y: y})
			}
		}
		if len(at) == 0 {
			continue
		}
		line, dots, err := plotter.NewLinePoints(at)
		if err != nil {
			return nil, err
		}
		line.Color, dots.Color, dots.Shape = hue(s), hue(s), draw.CircleGlyph{}
		p.Add(line, dots)
		p.Legend.Add(s, line, dots)
	}
	ticks := make([]plot.Tick, len(r.Options.Clusters))
	for i, n := range r.Options.Clusters {
		ticks[i] = plot.Tick{Value: math.Log2(float64(n)), Label: fmt.Sprint(n)}
	}
	p.X.Tick.Marker = plot.ConstantTicks(ticks)
	p.Y.Max *= 1.35
	return p, nil
}
